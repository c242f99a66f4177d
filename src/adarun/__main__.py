"""`python -m adarun`."""

from adarun.cli.app import main

if __name__ == "__main__":
    main()
