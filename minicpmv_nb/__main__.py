"`python -m minicpmv_nb` is the command `minicpmv_nb`."
import sys
from .command import main
if __name__ == '__main__': sys.exit(main())
