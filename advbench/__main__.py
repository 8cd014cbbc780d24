import sys

from advbench.cli import main

sys.exit(main())
