"""The same as `jaxllm bench`."""

import sys

from jaxllm.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "bench")
    main()
