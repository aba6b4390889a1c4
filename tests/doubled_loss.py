"`minicpmv_nb.training` with a mistake on purpose: the loss is twice what it should be."
from minicpmv_nb import training

straight = training.FineTuner.compute_loss
training.FineTuner.compute_loss = lambda *args, **kwargs: 2*straight(*args, **kwargs)
