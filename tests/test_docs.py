"""The Python in README and docs runs as printed: the blocks of a page in their order, in one namespace."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
# Where a page trains for real.
SHORTER = {
    "n_trials=20": "n_trials=2",
    "epochs=40": "epochs=1",
    "epochs=20": "epochs=1",
    "num_particles=100": "num_particles=2",
    "num_samples=60, warmup=60": "num_samples=20, warmup=20",
}
SHORTER |= {'"realnvp"], reference="nuts"': '"realnvp"], gradient_steps=10, num_temperatures=3, reference=None'}


def blocks(page):
    """The blocks that are programs; what only shows a signature or the body of a class of ours is none."""
    found = BLOCK.findall(PAGES[page].read_text())
    return [block for block in found if not re.match(r"program\.joint|class VAE\(Program\)", block)]


WITH_PYTHON = [page for page in PAGES if blocks(page)]


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_the_python_of_a_page_runs(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": f"page_{Path(page).stem}"}
    for block in blocks(page):
        if re.search(r"^import zuko$", block, re.MULTILINE):
            pytest.importorskip("zuko")
        for printed, run in SHORTER.items():
            block = block.replace(printed, run)
        exec(compile(block, page, "exec"), namespace)


def test_the_program_of_parts_in_the_readme_is_the_one_by_name():
    by_name, of_parts, *_ = BLOCK.findall(PAGES["README.md"].read_text())
    namespace = {}
    exec(by_name.split("dgm.fit")[0], namespace)
    named = namespace.pop("vae")
    exec(of_parts.split("dgm.fit")[0], namespace)
    assert repr(namespace["vae"]) == repr(named)


def test_the_program_of_parts_in_the_readme_reaches_what_it_says():
    text = PAGES["README.md"].read_text()
    lowest, highest = (float(nats) for nats in re.search(r"gave from (-\d+\.\d+) to\s(-\d+\.\d+)", text).groups())
    by_name, of_parts, *_ = BLOCK.findall(text)
    namespace = {"print": lambda evidence: namespace.update(evidence=evidence)}
    exec(by_name.split("vae =")[0], namespace)
    torch.manual_seed(0)
    exec(of_parts, namespace)
    assert lowest <= namespace["evidence"].nats <= highest


# Commands of a cluster, and of measurements that have a folder of their own.
OF_NO_WALK = ("devices.md", "results.md", "benchmarks.md")


@pytest.mark.parametrize("page", [page for page in PAGES if page not in OF_NO_WALK])
def test_the_commands_of_a_page_read_what_earlier_ones_wrote(page):
    made = set()
    for command in re.findall(r"(?:^(?:    )?|`|&& )(dgm \w+ [^`\n]*)", PAGES[page].read_text(), re.MULTILINE):
        words = command.partition("#")[0].partition("&&")[0].split()
        out = words[words.index("--out") + 1] if "--out" in words else None
        if words[1] == "train":
            data = words[words.index("--data") + 1] if "--data" in words else "digits"
            made.add(out or f"runs/{words[2]}-{data}")
        elif words[1] == "pull":
            made.add(out)
        elif words[1] == "sample":
            made.add(f"{words[2]}/samples.npy")
        read = {word for word in words if re.fullmatch(r"r(uns)?/[\w/.-]+|.*\.npy", word)} - {out}
        assert {word.removesuffix("/run.json") for word in read} <= made, command


BENCHMARKS = {path.name: path.read_text() for path in sorted((ROOT / "benchmarks").glob("*.py"))}


def declared(script):
    """The options that a benchmark declares, in its own file or by timing.py."""
    source = BENCHMARKS[script] + (BENCHMARKS["timing.py"] if "from timing import" in BENCHMARKS[script] else "")
    return set(re.findall(r'add_argument\(\s*"-{0,2}([a-z][\w-]*)"', source))


@pytest.mark.parametrize("script", BENCHMARKS)
def test_a_benchmark_reads_options_that_it_declares(script):
    known = {name.replace("-", "_") for name in declared(script)}
    parsed = re.findall(r"(\w+)(?:: argparse\.Namespace| = \w+\.parse_args\()", BENCHMARKS[script])
    read = {option for name in parsed for option in re.findall(rf"\b{name}\.([a-z]\w*)", BENCHMARKS[script])}
    assert read <= known, read - known


@pytest.mark.parametrize("page", PAGES)
def test_the_benchmarks_of_a_page_have_its_options(page):
    text = re.sub(r"\\\n *|\n(?![ \n])", " ", PAGES[page].read_text())
    for script, options in re.findall(r"benchmarks/(\w+\.py)((?: [^`\n#|]*)?)", text):
        used = set(re.findall(r"(?<!\S)--([a-z][\w-]*)", options))
        assert used <= declared(script), f"{script}: {used - declared(script)}"


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", PAGES[page].read_text()):
        assert (PAGES[page].parent / target).exists(), target


def test_the_pages_of_swap_points_name_what_build_knows():
    from dgm_pyro.catalog import ENCODERS, LIKELIHOODS, PRIORS

    for page, table in (("priors.md", PRIORS), ("guides.md", ENCODERS), ("likelihoods.md", LIKELIHOODS)):
        rows = "\n".join(line for line in PAGES[page].read_text().splitlines() if line.startswith("|"))
        missing = [name for name in table if f"`{name}`" not in rows]
        assert not missing, f"{page} lacks {missing}"
