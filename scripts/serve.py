"""The same as `jaxllm serve`."""

import sys

from jaxllm.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "serve")
    main()
