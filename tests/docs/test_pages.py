"""The pages in docs/ hold together: links lead somewhere, files they name exist, and no page has an orphan image."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMED_FILES = re.compile(r"`((?:mllm|tests|configs|benchmarks|scripts|docs)/[\w/.-]+\.(?:py|yaml|json|md|sh))`")


def anchors_of(page: Path) -> set[str]:
    """The anchors that a host of Markdown makes of the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors_of(target), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = NAMED_FILES.findall(page.read_text())
    assert not [path for path in named if not (ROOT / path).is_file()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_a_page_is_closed(page: Path) -> None:
    assert len(re.findall(r"^```", page.read_text(), re.M)) % 2 == 0


def test_code_and_configs_name_pages_that_exist() -> None:
    sources = [path for folder in ("mllm", "configs", "benchmarks", "tests") for path in (ROOT / folder).rglob("*")]
    for path in sources:
        if path.suffix in (".py", ".yaml") and path != Path(__file__):
            missing = [page for page in re.findall(r"docs/\w+\.md", path.read_text()) if not (ROOT / page).is_file()]
            assert not missing, f"{path.relative_to(ROOT)} names {missing}"


def test_every_image_in_docs_is_shown_by_a_page() -> None:
    shown = {
        link.rpartition("/")[2] for page in PAGES for link in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text())
    }
    assert {path.name for path in (ROOT / "docs").glob("*.png")} == shown


def test_every_fact_table_stands_once() -> None:
    """A row of figures that stands on two pages would be changed on one of them."""
    rows: dict[str, str] = {}
    for page in PAGES:
        for row in re.findall(r"^\|.*\d.*\|$", page.read_text(), re.M):
            assert rows.setdefault(row, page.name) == page.name, f"{row} stands in {rows[row]} and {page.name}"


def test_the_architecture_page_names_files_and_the_order_of_packages() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"mllm/[\w/]+(?:\.py|/)", page))
    assert len(named) > 25
    assert not [path for path in named if not (ROOT / path).exists()]
    order = page.split("## The order of packages")[1].split("```")[1].split()
    written = re.search(r"^ORDER = \[(.*?)^\]", (ROOT / "tests" / "test_architecture.py").read_text(), re.M | re.S)
    assert written is not None
    assert order == re.findall(r'"(\w+)"', written[1])


def configs_of_pages() -> list[tuple[str, str]]:
    """Every block of YAML that shows a part of a run config, with its page; that on extending has kinds of its own."""
    return [
        (page.name, block)
        for page in PAGES
        if page.name != "extending.md"
        for block in re.findall(r"^```yaml\n(.*?)^```$", page.read_text(), re.M | re.S)
        if not block.startswith("- ")
    ]


@pytest.mark.parametrize(("page", "block"), configs_of_pages())
def test_every_config_that_a_page_shows_is_read(page: str, block: str) -> None:
    from mllm.config.model import AudioConfig, ImageConfig, VideoConfig
    from mllm.config.reading import check_keys, parse_yaml, read
    from mllm.config.run import RunConfig, SamplerConfig

    values = parse_yaml(block)
    check_keys(RunConfig, values)
    media = {"image": ImageConfig, "audio": AudioConfig, "video": VideoConfig}
    for medium, kind in media.items():
        if medium in (model := values.get("model", {})):
            read(kind, model[medium], path=f"model.{medium}")
    if "sampler" in values:
        read(SamplerConfig, values["sampler"], path="sampler")
