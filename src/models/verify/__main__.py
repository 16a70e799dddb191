"""Entry point for `python -m models.verify`."""

from models.verify.run import main

if __name__ == "__main__":
    main()
