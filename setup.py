"""Everything is declared in pyproject.toml. This adds conf/, which lies beside src/, to the built package `data`."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConf(build_py):
    """An editable install reads conf/ where it lies; a wheel carries a copy as data/conf/."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            copy = Path(self.build_lib, "data", "conf")
            shutil.rmtree(copy, ignore_errors=True)  # build/ may hold files of an earlier build
            shutil.copytree("conf", copy)


setup(cmdclass={"build_py": BuildWithConf})
