"""Entry point of `python -m models.verify`."""

from models.verify.run import main

if __name__ == "__main__":
    main()
