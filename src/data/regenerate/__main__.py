"""Entry point for `python -m data.regenerate`."""

from data.regenerate.run import main

if __name__ == "__main__":
    main()
