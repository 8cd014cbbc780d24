import sys

from advbench.cli.main import main

sys.exit(main())
