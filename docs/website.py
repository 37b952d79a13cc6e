"""The site: `python docs/website.py build/site`, which is what `make site` calls.

Lays out beside each other what Sphinx reads: the guides, the executed notebooks (those that
`make figures` has left in runs/notebooks, or else the stripped ones), the results, a card per arm,
the parameter files, which runs each figure was drawn from, and a page per wing for the API. Then
Sphinx builds it, and every internal link is followed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote, urlsplit

import cards
import mapping_explorer
import readme
import yaml

ROOT = readme.PROJECT
PROFILE = "quick"
GUIDES = "concepts mappings mapping_explorer controls cost verdicts studies own_data jupyter"
GUIDES = [*GUIDES.split(), "cluster", "data_parallel", "frameworks"]
MEASURED = ["results", "results.zh-CN", "reliability", "speed", "decisions"]
# On the first page: of each the first that there is.
FIRST = ("adaptability-heat-map", "convergence-update", "mechanism-controls", "efficiency-pareto")


# --- what Sphinx reads ----------------------------------------------------------------------------


def lay_out(source: Path, runs: Path) -> None:
    """Write all pages into a folder."""
    docs = ROOT / "docs"
    source.mkdir(parents=True)
    for file in (*docs.glob("*.md"), *docs.glob("*.svg"), docs / "conf.py"):
        shutil.copy(file, source)
    shutil.copytree(docs / "_static", source / "_static")
    pictures = source / "figures"
    pictures.mkdir()
    shutil.copy(ROOT / "tests/benchmarks/results/generative_samples.png", pictures)
    manifest = {}
    for folder in filter(Path.is_dir, (ROOT / place for place in readme.PLACES)):
        profile = PROFILE if folder.name == "figures" else folder.name
        start = "" if profile == PROFILE else f"{profile}-"
        for file in folder.glob("*.png"):
            shutil.copy(file, pictures / f"{start}{file.name}")
        drawn = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        manifest |= {f"{start}{n}": entry | {"profile": profile} for n, entry in drawn.items()}
    results = (ROOT / readme.place(ROOT) / "results.md").read_text(encoding="utf-8")
    found = readme.read(results)
    pages = {
        "index.md": _index(found, manifest),
        "results.md": f"# Results\n\n{results}",
        "results.zh-CN.md": readme.chinese_page(found),
        "zh-CN.md": (ROOT / "README.zh-CN.md").read_text(encoding="utf-8"),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        "figures.md": _figures(manifest),
        "runs.md": _runs(manifest),
        "parameters.md": _parameters(),
        "notebooks/index.md": _notebooks(source / "notebooks", runs),
    }
    for name, text in pages.items():
        (source / name).write_text(text, encoding="utf-8")
    page = source / "mapping_explorer.md"
    text = mapping_explorer.filled(page.read_text(encoding="utf-8"), mapping_explorer.recorded())
    page.write_text(text, encoding="utf-8")
    for file in source.glob("*.md"):
        file.write_text(_relinked(file.read_text(encoding="utf-8")), encoding="utf-8")
    cards.write(source / "methods", runs)
    _api(source / "api")


def _relinked(page: str) -> str:
    """Return a page with links that lead from where it stood in the project to the site's pages."""
    page = page.replace(
        "../tests/benchmarks/results/generative_samples", "figures/generative_samples"
    )
    page = re.sub(r"\]\(docs/", "](", page)
    page = re.sub(r"\]\(figures/(\w+)/([\w-]+\.png)\)", r"](figures/\1-\2)", page)
    page = re.sub(r"\]\(figures/(\w+/)?results\.md\)", "](results.zh-CN.md)", page)
    page = re.sub(r"\]\((?:\.\./)?params/([\w/]+\.yaml)\)", _parameters_of, page)
    page = re.sub(r"\]\(\.\./notebooks/", "](notebooks/", page)
    page = re.sub(r"\]\((?:\.\./)?CONTRIBUTING\.md\)", "](contributing.md)", page)
    return re.sub(r"\]\((?:\.\./)?README(\.zh-CN)?\.md\)", _home, page)


def _home(found: re.Match[str]) -> str:
    return f"]({'zh-CN' if found[1] else 'index'}.md)"


def _parameters_of(found: re.Match[str]) -> str:
    return f"](parameters.md#{_anchor(cards.PARAMS / found[1])})"


def _contents(caption: str, *entries: str) -> str:
    listed = "\n".join(entries)
    return f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```\n"


def _index(found: readme.Results, manifest: dict[str, Any]) -> str:
    """Return the first page: the question, the verdicts, and figures with where they come from."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    opening = text[text.index("**Under a") : text.index("## What was found")]
    opening = opening.replace("docs/", "")
    parts = ["# repeatlab", opening.strip(), "## What was found"]
    parts.append(f"{readme.short(found, readme.ENGLISH, None)}")
    if found.verdicts:
        head, *rows = found.verdicts
        parts.append(readme.table([head, *([*row] for row in rows)]))
        plan = found.setting["plan"]
        parts.append(
            f"[All tables](results.md) · [notebook](notebooks/30_paper.ipynb) ·"
            f" [parameters](parameters.md#{plan}-plan-yaml) of the plan `{plan}` ·"
            " [what such verdicts are worth](decisions.md) · [in Chinese](zh-CN.md)"
        )
    for start in FIRST:
        # The reference study's before the quick profile's.
        named = [name for name in manifest if start in name]
        parts += [_figure(name, manifest) for name in named[:1]]
    parts.append("[All figures](figures.md)")
    parts += [
        _contents("Guides", *GUIDES, "glossary"),
        _contents("Measured", *MEASURED, "figures", "runs"),
        _contents("Reference", "notebooks/index", "methods/index", "parameters", "api/index"),
        _contents("About", "prior_work", "contributing", "中文 <zh-CN>"),
    ]
    return "\n\n".join(parts) + "\n"


# --- figures, parameters, runs --------------------------------------------------------------------


def _figure(name: str, manifest: dict[str, Any]) -> str:
    """Return a figure, linked to its notebook, parameters and runs."""
    entry = manifest[name]
    notebook, number = entry["notebook"], _run_sets(manifest).index(entry["runs"])
    file = _parameter_file(notebook, entry["profile"])
    parameters = f" · [parameters](parameters.md#{_anchor(file)})" if file else ""
    return (
        f":::{{figure}} figures/{name}.png\n:alt: {name.replace('-', ' ')}\n\n"
        f"`{name}`: [notebook](notebooks/{notebook}.ipynb){parameters} ·"
        f" [{len(entry['runs'])} runs](runs.md#set-{number + 1}) · commit `{entry['commit']}`\n:::"
    )


def _figures(manifest: dict[str, Any]) -> str:
    parts, notebooks = ["# Figures"], sorted({entry["notebook"] for entry in manifest.values()})
    for notebook in notebooks:
        parts.append(f"## {notebook}")
        parts += [_figure(n, manifest) for n, e in manifest.items() if e["notebook"] == notebook]
    return "\n\n".join(parts) + "\n"


def _run_sets(manifest: dict[str, Any]) -> list[list[str]]:
    sets: list[list[str]] = []
    for entry in manifest.values():
        if entry["runs"] not in sets:
            sets.append(entry["runs"])
    return sets


def _runs(manifest: dict[str, Any]) -> str:
    parts = [
        "# Runs",
        "The runs that figures were drawn from, by their ids in `runs/<task>/<id>/`.",
    ]
    for number, ids in enumerate(_run_sets(manifest), 1):
        drawn = [name for name, entry in manifest.items() if entry["runs"] == ids]
        parts += [f"## Set {number}", f"{len(ids)} runs: {', '.join(f'`{n}`' for n in drawn)}."]
        parts.append(
            "```text\n" + "\n".join(" ".join(ids[i : i + 4]) for i in range(0, len(ids), 4))
        )
        parts[-1] += "\n```"
    return "\n\n".join(parts) + "\n"


def _anchor(file: Path) -> str:
    return re.sub(r"[^a-z0-9]+", "-", str(file.relative_to(cards.PARAMS)).lower())


def _parameter_file(notebook: str, profile: str = PROFILE) -> Path | None:
    """Return a profile's parameter file for a notebook, if it has one."""
    for file in sorted((cards.PARAMS / profile).glob("*.yaml")):
        if yaml.safe_load(file.read_text(encoding="utf-8")).get("notebook") == notebook:
            return file
    return None


def _parameters() -> str:
    parts = ["# Parameters", "Every file of `params/`, as `repeatlab run` and `figures` read them."]
    for file in sorted(cards.PARAMS.rglob("*.yaml")):
        path = file.relative_to(cards.PARAMS)
        text = file.read_text(encoding="utf-8").rstrip()
        parts += [f"({_anchor(file)})=\n## {path}", f"```yaml\n{text}\n```"]
    return "\n\n".join(parts) + "\n"


# --- notebooks and API ----------------------------------------------------------------------------


def _notebooks(folder: Path, runs: Path) -> str:
    """Copy the notebooks, executed where they are, and return their index."""
    folder.mkdir()
    rows, names = [["notebook", "outputs"]], []
    for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
        parameters = _parameter_file(file.stem)
        executed = runs / "notebooks" / PROFILE / f"{parameters.stem}.ipynb" if parameters else file
        there = parameters is not None and executed.exists()
        notebook = json.loads((executed if there else file).read_text(encoding="utf-8"))
        if there and "error" in {o["output_type"] for o in _outputs(notebook)}:  # cut short
            there, notebook = False, json.loads(file.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            source = "".join(cell["source"])
            cell["source"] = re.sub(r'"/[^"\n]*/(runs|figures)"', r'"../\1"', source)
            if cell["cell_type"] == "code":
                cell["outputs"] = _shown(cell["outputs"])
        if not there:
            said = "*Without outputs: these pages were built where it had not been executed.*"
            note = {"cell_type": "markdown", "metadata": {}, "id": "site-note", "source": said}
            notebook["cells"].insert(1, note)
        (folder / file.name).write_text(json.dumps(notebook), encoding="utf-8")
        title = "".join(notebook["cells"][0]["source"]).partition("\n")[0].lstrip("# ")
        outputs = f"of `params/{parameters.relative_to(cards.PARAMS)}`" if there else "none"
        rows.append([f"[{file.stem[:2]} {title}]({file.name})", outputs])
        names.append(file.stem)
    listed = "\n".join(names)
    return (
        "# Notebooks\n\nAs `make figures` has executed them, where it has.\n\n"
        f"{readme.table(rows)}\n\n```{{toctree}}\n:hidden:\n\n{listed}\n```\n"
    )


def _outputs(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def _shown(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return outputs that a page can show: no progress bars, no widgets without a picture."""
    kept = []
    for output in outputs:
        data = output.get("data", {})
        widget = data.pop("application/vnd.jupyter.widget-view+json", None)
        pictured = any(kind.startswith(("image/", "text/html")) for kind in data)
        progress = output.get("name") == "stderr"
        if not progress and (pictured or not widget) and (data or "text" in output):
            kept.append(output)
    return kept


def _api(folder: Path) -> None:
    """Write a page for each wing, with every public module of it."""
    folder.mkdir()
    wings = readme._assigned("tests/wings.py", "ORDER")
    for wing in wings:
        modules = []
        for file in sorted((ROOT / "repeatlab" / wing).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if not any(part.startswith("_") and part != "__init__" for part in parts):
                modules.append(name)
        lines = [wing, "=" * len(wing), ""]
        for name in modules:
            lines += [name, "-" * len(name), "", f".. automodule:: {name}", ""]
        (folder / f"{wing}.rst").write_text("\n".join(lines), encoding="utf-8")
    said = readme.wings({})
    (folder / "index.md").write_text(
        f"# API\n\n{said}\n\n```{{toctree}}\n\n" + "\n".join(wings) + "\n```\n", encoding="utf-8"
    )


# --- links ----------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """Collects what a page names, and what it links to or loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take note of a tag."""
        given = dict(attrs)
        self.names |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        for key in ("src", "href") if tag == "link" else ("src",):
            if given.get(key) and given.get("rel") not in ("canonical", "search"):
                self.loaded.append(given[key])


def broken(site: Path) -> Iterator[str]:
    """Yield every internal link that leads nowhere, and whatever a page loads from elsewhere."""
    pages = {file: _Page(file.read_text(encoding="utf-8")) for file in site.rglob("*.html")}
    for file, page in pages.items():
        where = file.relative_to(site)
        yield from (f"{where} loads {one}" for one in page.loaded if urlsplit(one).netloc)
        for link in (*page.links, *page.loaded):
            scheme, host, path, _, anchor = urlsplit(link)
            if scheme or host:
                continue
            target = (file.parent / unquote(path)).resolve() if path else file
            if target.is_dir():
                target /= "index.html"
            known = pages.get(target)
            if not target.exists() or (anchor and known and unquote(anchor) not in known.names):
                yield f"{where} links to {link}"


def build(site: Path, runs: Path) -> list[str]:
    """Build the site, and return its broken links."""
    from sphinx.cmd.build import build_main

    if site.exists():
        shutil.rmtree(site)
    with TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        lay_out(source, runs)
        ended = build_main(["-q", "-b", "html", "-d", f"{scratch}/trees", str(source), str(site)])
    if ended:
        raise SystemExit(ended)
    return list(broken(site))


def main() -> None:
    """Build, and fail where a link is dead."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("site", type=Path)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="a run store")
    given = parser.parse_args()
    dead = build(given.site.resolve(), given.runs.resolve())
    print("\n".join(dead) or f"{given.site / 'index.html'}: every internal link leads somewhere")
    sys.exit(1 if dead else 0)


if __name__ == "__main__":
    main()
