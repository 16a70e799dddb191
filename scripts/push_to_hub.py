"""Upload an exported drafter to the Hugging Face Hub in one commit. The same command resumes an interrupted upload.

    python scripts/push_to_hub.py checkpoints/tiny/export owner/name              # private
    python scripts/push_to_hub.py checkpoints/tiny/export owner/name --public --tag v1

Uses the token from HF_TOKEN or `hf auth login`. A run with export.push_to_hub=owner/name uploads its export at the end.
"""

import argparse
import sys
from pathlib import Path

from data.errors import INTERRUPTED, UserError
from train.publish.upload import Destination, push


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="exported drafter, such as checkpoints/tiny/export")
    parser.add_argument("repository", help="owner/name; created if missing")
    parser.add_argument("--public", action="store_true", help="make the repository public; the default is private")
    parser.add_argument("--tag", help="tag of the uploaded revision, such as v1")
    arguments = parser.parse_args()
    to = Destination(arguments.repository, private=not arguments.public, tag=arguments.tag)
    try:
        print(f"pushed to {push(arguments.directory, to)}")
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; the same command resumes the upload", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
