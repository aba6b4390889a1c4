"`minicpmv_nb.training` whose loss is not a number as soon as sample s5 is seen."
from minicpmv_nb import training

straight = training.FineTuner.compute_loss

def compute_loss(self, model, inputs, *args, **kwargs):
    loss = straight(self, model, inputs, *args, **kwargs)
    return loss*float('nan') if 's5' in inputs['ids'] else loss

training.FineTuner.compute_loss = compute_loss
if __name__ == '__main__': training.main()
