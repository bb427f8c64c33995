"""The lock is what pyproject.toml asks for: pinned with hashes, within the bounds, and on them at the oldest end."""

import re
import tomllib
from pathlib import Path

import pytest
import versions
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from versions import DEMO_EXTRAS, DEV_EXTRAS, FOLDER, OLDEST_EXTRAS, PAGE_EXTRAS, declared, locked_torch, lowest, pinned

FILES = sorted(FOLDER.glob("*.txt"))
EVERY_EXTRA = list(tomllib.loads((versions.ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def test_every_dependency_has_a_lower_and_an_upper_bound() -> None:
    for requirement in declared(EVERY_EXTRA):
        operators = sorted(one.operator for one in requirement.specifier)
        assert operators in (["<", ">="], ["=="]), str(requirement)


@pytest.mark.parametrize(
    ("name", "extras"),
    [("dev", DEV_EXTRAS), ("demo", DEMO_EXTRAS), ("oldest", OLDEST_EXTRAS), ("page", PAGE_EXTRAS)],
)
def test_a_lock_holds_every_dependency_within_its_bounds(name: str, extras: tuple[str, ...]) -> None:
    held = pinned(FOLDER / f"{name}.txt") | {"torch": {Version(locked_torch())}}
    for requirement in declared(extras):
        versions_held = held[canonicalize_name(requirement.name)]
        assert all(requirement.specifier.contains(version, prereleases=True) for version in versions_held), str(
            requirement
        )


def test_the_oldest_lock_is_the_lower_bounds() -> None:
    held = pinned(FOLDER / "oldest.txt") | {"torch": {Version(locked_torch())}}
    bounds = {canonicalize_name(requirement.name): {lowest(requirement)} for requirement in declared(OLDEST_EXTRAS)}
    assert {name: held[name] for name in bounds} == bounds


def test_what_demo_and_dev_share_is_the_same_release() -> None:
    dev, demo = pinned(FOLDER / "dev.txt"), pinned(FOLDER / "demo.txt")
    assert demo == {name: dev[name] for name in demo}
    assert pinned(FOLDER / "build.txt").items() <= dev.items()


def test_the_page_holds_back_what_is_named_and_nothing_else() -> None:
    dev, page = pinned(FOLDER / "dev.txt"), pinned(FOLDER / "page.txt")
    assert {name for name in page if name in dev and page[name] != dev[name]} == set(versions.HELD_BACK_BY_PAGE)


def test_both_builds_of_torch_are_one_release_and_no_other_file_has_it() -> None:
    cpu, registry = pinned(FOLDER / "torch-cpu.txt"), pinned(FOLDER / "torch.txt")
    assert cpu == {"torch": {Version(f"{locked_torch()}+cpu")}}
    assert registry["torch"] == {Version(locked_torch())}
    # `==` would take the CPU's build too, where an index has it, and fail at its hash.
    assert f"\ntorch==={locked_torch()} " in (FOLDER / "torch.txt").read_text()
    for name in ("build", "demo", "dev", "oldest", "page"):
        held = pinned(FOLDER / f"{name}.txt")
        assert not [one for one in held if one.startswith(("torch", "triton", "nvidia-", "cuda-"))]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_pin_has_hashes_and_no_file_names_an_index(file: Path) -> None:
    text = file.read_text()
    pins = re.split(r"\n(?=\S)", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
    assert pins
    for pin in pins:
        assert re.match(r"[\w.-]+={2,3}\S+", pin), pin
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", pin), pin
    assert not re.search(r"https?:|file:|--(extra-)?index|--find-links", text)


def test_extras_that_name_extras_are_followed(tmp_path: Path) -> None:
    file = tmp_path / "pyproject.toml"
    file.write_text(
        '[project]\nname = "elastic-mllm"\ndependencies = ["a>=1,<2"]\n[project.optional-dependencies]\n'
        'all = ["elastic-mllm[some]", "c==3"]\nsome = ["b[x]>=2,<3"]\n'
    )
    assert [str(requirement) for requirement in declared(["all"], file)] == ["a<2,>=1", "c==3", "b[x]<3,>=2"]
    assert [versions.without_upper_bound(requirement) for requirement in declared(["all"], file)] == [
        "a>=1",
        "c>=3",
        "b[x]>=2",
    ]
    with pytest.raises(ValueError, match="the project has no extra 'none'; it has all, some"):
        declared(["none"], file)


def test_a_dependency_without_a_lower_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="must have one lower bound"):
        lowest(Requirement("a<2"))


def test_what_moved_is_shown_beside_lock_and_range(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The registry's answer alone is made up: the newest of everything is what is locked, but for two."""
    locked = pinned(FOLDER / "page.txt") | pinned(FOLDER / "dev.txt") | pinned(FOLDER / "torch.txt")
    locked |= {"num2words": {Version("0.5.14")}}

    def newest_of(requirements: list[str]) -> dict[str, Version]:
        names = [canonicalize_name(Requirement(line).name) for line in requirements]
        newest = {name: max(locked.get(name, {Version("0.29.1")})) for name in names}
        return newest | {"transformers": Version("5.25.0"), "rich": Version("15.0.1"), "torchaudio": Version("2.11.1")}

    monkeypatch.setattr(versions, "newest_of", newest_of)
    versions.show_moved()
    lines = capsys.readouterr().out.splitlines()
    by_name = {line.split()[0]: line for line in lines[1:-1]}
    assert by_name["transformers"].endswith("beyond the tested range")
    assert by_name["rich"].endswith("newer than the lock")
    assert "not locked" in by_name["torchvision"]
    assert by_name["numpy"].endswith("<3,>=2.1")
    assert lines[-1] == f"1 of {len(by_name)} have a release beyond the tested range"
