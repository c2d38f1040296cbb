"""The same as `jaxllm chat`."""

import sys

from jaxllm.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "chat")
    main()
