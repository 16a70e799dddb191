"""Entry point for `python -m data.report`."""

from data.report.run import main

if __name__ == "__main__":
    main()
