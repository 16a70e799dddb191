"""README.md and docs/: commands that exist, settings that compose, links that lead somewhere; run_docs.py runs them."""

import argparse
import ast
import importlib
import re
import runpy
import shlex
import shutil
import sys
from importlib.util import find_spec

import pytest
from docs_commands import PYTHON, SETTING, Command, blocks_of, commands_of, is_settings, pages, spans
from helpers.shared import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from run_docs import REPLACED, RULES, prepared, rule_of

from data.config.compose import CONF, GROUPS, check_settings, composed
from train.sweep import jobs

COMMANDS = [command for page in pages() for command in commands_of(page)]
HYDRA = re.compile(r"(python -m (train|data\.\w+)|scripts/slurm/train\.sbatch|scripts/research/ablate_layers\.py)\s")
ARGUMENTS = re.compile(r"python (-m models\.\w+|scripts/(?!\w+/(?:ablate|measure))\S+\.py)")
WHOLE = [command for command in COMMANDS if command.kind != PYTHON and "..." not in command.text]


def named(command: Command) -> str:
    return f"{command.place}-{command.text.split()[-1]}"


def words(text: str) -> list[str]:
    for placeholder, own in REPLACED.items():
        text = text.replace(placeholder, own)
    return shlex.split(text)


def check_overrides(overrides: list[str]) -> None:
    """Those of all jobs, if it is a sweep; a launcher is Hydra's own business."""
    for job in jobs([word for word in overrides if word != "-m" and not word.startswith("hydra")]):
        check_settings(composed(job), job)


class Parsed(Exception):
    """The command line was read; what follows is not wanted."""


def check_arguments(arguments: list[str], monkeypatch) -> None:
    """`python` with these, up to the point where its options are read."""
    read = argparse.ArgumentParser.parse_args

    def only_read(self, *args, **settings):
        read(self, *args, **settings)
        raise Parsed

    module = arguments[0] == "-m"
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_read)
    monkeypatch.setattr(sys, "argv", arguments[module:])
    with pytest.raises(Parsed):
        if module:
            runpy.run_module(arguments[1], run_name="__main__")
        else:
            runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")


def sections(page) -> set[str]:
    """Anchors of a page's headings, as GitHub forms them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def check_links(page) -> list[str]:
    """Links to missing files and headings."""
    broken = []
    for path, heading in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        file = page.parent / path if path else page
        if "://" not in path and not (file.exists() and (not heading or heading in sections(file))):
            broken.append(f"{path}#{heading}" if heading else path)
    return broken


def test_every_command_has_a_rule_and_every_rule_a_command():
    used = [rule_of(command) for command in COMMANDS]
    assert [rule.pattern for rule in RULES if rule not in used] == []


def said(command: Command) -> str:
    """The overrides of a command of Hydra's."""
    return HYDRA.split(f"{command.text} ")[-1].strip()


@pytest.mark.slow
def test_settings_compose():
    ours = [c for c in WHOLE if HYDRA.search(f"{c.text} ")]
    assert len(ours) > 20
    for overrides in {said(command) for command in ours if "+experiment" in command.text}:
        check_overrides(words(overrides))
    for added in {rule.add for rule in RULES if "stage." in rule.add}:
        check_overrides(["+experiment=qwen3_8b", *words(added)])
    for command in COMMANDS:
        if command.kind == SETTING:
            check_overrides(["+experiment=tiny", *words(command.text)])


def absent(command: Command) -> list[str]:
    """Modules and scripts that a command names and that are not there."""
    modules, scripts = re.findall(r"python -m ([\w.]+)", command.text), re.findall(r"scripts/[\w./]+", command.text)
    return [name for name in modules if not find_spec(name)] + [name for name in scripts if not (ROOT / name).exists()]


def test_modules_and_scripts_exist():
    assert [name for command in COMMANDS for name in absent(command)] == []


@pytest.mark.parametrize("command", [c for c in WHOLE if ARGUMENTS.search(c.text)], ids=named)
def test_scripts_know_their_options(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    call = words(command.text)
    check_arguments(call[call.index("python") + 1 :], monkeypatch)
    rule = rule_of(command)
    if rule.run:
        call = words(prepared(command, rule))
        check_arguments(call[call.index("python") + 1 :], monkeypatch)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.kind == PYTHON], ids=lambda c: c.place)
def test_python_blocks_compile_and_import_what_exists(command):
    for node in ast.walk(ast.parse(command.text)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


def unknown_settings(text: str) -> list[str]:
    """Overrides in the sentences of a page that name no setting of conf/, be it by the end of its name."""
    known = [f".{key}" for key in keys(OmegaConf.to_container(composed(["+experiment=qwen3_8b"]), resolve=False))]
    unknown = []
    for line, _, span in spans(text):
        for key, value in re.findall(r"(?:^| )([a-z][\w./]*)=(\S+)", span if is_settings(span) else ""):
            if key in GROUPS and "." not in value:
                exists = (CONF / key / f"{value}.yaml").exists()
            else:
                exists = key.startswith("hydra") or "." not in key or any(one.endswith(f".{key}") for one in known)
            unknown += [] if exists else [f"{line}: {span}"]
    return unknown


def keys(tree: dict, path: str = "") -> list[str]:
    here = [f"{path}{key}" for key in tree]
    return here + [
        one for key, value in tree.items() if isinstance(value, dict) for one in keys(value, f"{path}{key}.")
    ]


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_settings_in_the_text_exist(page):
    assert unknown_settings(page.read_text(encoding="utf-8")) == []


def test_experiments_and_objectives_that_the_pages_show_compose(tmp_path):
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    shown = []
    for page in pages():
        for block in blocks_of(page.read_text(encoding="utf-8")):
            if file := re.search(r"# conf/(\w+)/(\w+)\.yaml", " ".join(block.lines[:2])):
                (tmp_path / "conf" / file[1] / f"{file[2]}.yaml").write_text("\n".join(block.lines), encoding="utf-8")
                shown.append((file[1], file[2]))
    assert shown
    with initialize_config_dir(str(tmp_path / "conf"), version_base="1.3"):
        for group, name in shown:
            chosen = [f"+experiment={name}"] if group == "experiment" else ["+experiment=tiny", f"{group}={name}"]
            config = compose("config", overrides=chosen)
            assert group != "experiment" or config.name == name


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_links_lead_to_files(page):
    assert check_links(page) == []


def test_the_readme_links_every_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    paths = [page.relative_to(ROOT).as_posix() for page in pages()[1:]]
    assert [path for path in paths if f"({path})" not in text] == []


def test_the_tree_of_the_architecture_is_the_tree():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    tree = next(block.lines for block in blocks_of(text) if block.lines[0].startswith("conf/ "))
    folder, listed = ROOT, set()
    for line in tree:
        names = [name.rstrip(",") for name in re.split(r"\s{2,}", line.strip())[0].split(", ")]
        folder = folder if line.startswith(" ") else ROOT / names[0]
        paths = [folder / name for name in names] if line.startswith(" ") else [folder]
        assert all(path.exists() for path in paths if "<" not in path.name), line
        listed |= {path.resolve() for path in paths}
    for package in ("data", "models", "train"):
        here = [path for path in (ROOT / "src" / package).iterdir() if path.name not in ("__init__.py", "__pycache__")]
        assert [path for path in here if path.resolve() not in listed] == []


def test_files_and_functions_of_the_data_flow_exist():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    found = re.findall(r"`((?:data|models|train)/[\w/]+\.py)`(?: \(`(\w+)`\))?", text)
    assert len(found) > 20
    assert [file for file, _ in found if not (ROOT / "src" / file).is_file()] == []
    assert [f"{file}: {name}" for file, name in found if name not in (ROOT / "src" / file).read_text("utf-8")] == []


def test_the_tests_named_for_each_accident_exist():
    lines = (ROOT / "docs/guide/robustness.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    names = [name for row in rows if len(row) == 3 and row[2] != "tests" for name in row[2].split(", ")]
    assert len(names) > 40
    assert [name for name in names if not list((ROOT / "tests").rglob(f"test_{name}.py"))] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 170


PAGE = """
Text with `python -m train` and `make test` and `not a command`, `stage.evaluate.num_prompts=3`.

```bash
$ python -m train +experiment=tiny \\
    name='a # b'   # why
# a comment
export A=1
```

```
step 1: python is fine
```

```
python scripts/x.py --flag
```

```
seed=1 name=b
```

```python
print("`python -m train` is not in a sentence")
```
"""


def test_what_counts_as_a_command(tmp_path):
    (tmp_path / "README.md").write_text(PAGE, encoding="utf-8")
    found = commands_of(tmp_path / "README.md", tmp_path)
    assert [(command.line, command.text) for command in found[:-1]] == [
        (2, "python -m train"),
        (2, "make test"),
        (5, "python -m train +experiment=tiny name='a # b'"),
        (8, "export A=1"),
        (16, "python scripts/x.py --flag"),
        (20, "seed=1 name=b"),
    ]
    assert (found[-1].line, found[-1].kind) == (24, PYTHON)


def broken(text: str, kind: str = "shell") -> Command:
    return Command("docs/x.md", 1, kind, text)


def test_wrong_commands_are_found(tmp_path, monkeypatch):
    with pytest.raises(LookupError, match="docs/x.md:1: no rule"):
        rule_of(broken("python scripts/unheard_of.py"))
    for wrong in ("stage.evaluate.num_promts=2", "+experiment=qwen3_9b", "trainer=tpu"):
        with pytest.raises(Exception, match="num_prompts|qwen3_9b|tpu"):
            check_overrides(words(said(broken(f"python -m train +experiment=tiny {wrong}"))))
    assert len(unknown_settings("as `data.row_lenght=3`, `trainer=tpu`, `trainer=ddp` or `data.max_seq_len=3`")) == 2
    assert absent(broken("python -m data.reprot +experiment=tiny")) == ["data.reprot"]
    assert absent(broken("GLIBC=1 python scripts/bench.py --steps 2")) == ["scripts/bench.py"]
    with pytest.raises(SystemExit):
        check_arguments(["scripts/checks/check_families.py", "--promts", "2"], monkeypatch)
    links = "[a](nowhere.md) [b](https://example.org/#x) [c](x.md#is-it-there) [d](#not-there)\n## Is it *there*?"
    (tmp_path / "x.md").write_text(links, encoding="utf-8")
    assert check_links(tmp_path / "x.md") == ["nowhere.md", "#not-there"]
