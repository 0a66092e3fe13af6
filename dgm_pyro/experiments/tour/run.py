"""The tour: train every family on images of digits, measure each on the uses of generative models, and write a report.

The measurements of each program: samples; the density of unseen digits, in bits per dimension; anomalies, detected by a
low p(x); a representation, evaluated by a linear probe; and for p(x, y) the reliability of its predictions under
increasing noise, compared with a discriminative p(y | x).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dgm_pyro.checks import check_counts, find_device
from dgm_pyro.experiments import report, runs
from dgm_pyro.experiments.tour.comparison import compare_classifiers
from dgm_pyro.experiments.tour.page import page_of, result_line
from dgm_pyro.experiments.tour.results import Tour
from dgm_pyro.experiments.tour.stops import DIGITS, IMAGES, Stop
from dgm_pyro.files import only_writer, refuse_file
from dgm_pyro.training.fit import NonFiniteLossError
from dgm_pyro.training.options import changes

__all__ = ["run"]


def run(
    out: str | Path = "tour",
    *,
    images: bool = False,
    quick: bool = False,
    longer: int = 1,
    seed: int = 0,
    device: str = "auto",
    stops: Sequence[Stop] | None = None,
    resume: bool = False,
) -> list[str]:
    """Run the tour. Results are stored as they are finished, and an interrupted tour still writes a report of them.

    Args:
        out: folder of the results: ``report.html``, ``metrics.json``, ``pictures/``, ``checkpoints/``.
        images: whether to use images of 28x28 pixels, `glyphs-digits`, instead of the 8x8 ones of scikit-learn.
        quick: whether to train for seconds instead of minutes.
        longer: how many times as many epochs to train.
        seed: seed of all random numbers.
        device: "auto", or a torch device.
        stops: the programs to train; default those that suit the images.
        resume: whether to keep the programs that an interrupted tour in ``out`` has trained, and to continue the
            training that was interrupted.

    Returns:
        A line for each program whose training failed; the tour continues without it.

    Raises:
        FileExistsError: ``out`` holds something other than a tour.
        ValueError: there is no such device, ``longer`` is no positive integer, or the tour to resume had another seed,
            another length or other images.
    """
    check_counts(longer=longer)
    where, folder = find_device(device), Path(out)
    plan = IMAGES if images else DIGITS
    if stops is not None:
        plan = replace(plan, stops=stops)
    asked = {"data": plan.data, "quick": quick, "longer": longer, "seed": seed}
    refuse_file(folder, "a tour is")
    with only_writer(folder):
        _check_is_tour(folder)
        if resume:
            _check_is_same(folder, asked)
        # The mark of a tour, complete or not, is written first, so that it exists after any interrupt.
        runs.write_json(folder / "metrics.json", {"complete": False, **asked, "programs": []})
        _clear(folder, () if resume else ("checkpoints",))
        return _visit_all(Tour(folder, quick, seed, where, plan, longer))


def _visit_all(tour: Tour) -> list[str]:
    stops = tour.plan.stops
    print(
        f"{len(stops)} programs on {len(tour.train)} digits of {tour.size} pixels, tested on {len(tour.test)}; "
        f"{tour.device}"
    )
    tour.pixel_probe = tour._probe(tour.train.x.flatten(1).float(), tour.test.x.flatten(1).float())
    try:
        for number, stop in enumerate(stops, start=1):
            print(f"[{number}/{len(stops)}] {stop.title}", flush=True)
            try:
                result = tour.visit(stop)
            except NonFiniteLossError as error:
                tour.failures.append(f"{stop.title}: {error}")
                print(f"        failed: {error}", flush=True)
                continue
            tour.results.append(result)
            print(f"        {result_line(result)}", flush=True)
            runs.write_json(tour.out / "metrics.json", tour.metrics())
        classifiers = {name: tour.result(f"{name}-classifier") for name in ("generative", "discriminative")}
        trained = {name: result.program for name, result in classifiers.items() if result is not None}
        if len(trained) == 2:
            print("classifiers under noise", flush=True)
            tour.comparison = compare_classifiers(trained, tour.test, tour.seed)
        tour.complete = not tour.failures
    finally:
        if tour.results:
            _finish(tour)
    return tour.failures


def _check_is_tour(out: Path) -> None:
    if any(out.iterdir()) and not (out / "metrics.json").is_file():
        raise FileExistsError(f"{out} is not empty and holds no tour: choose another --out")


def _check_is_same(out: Path, asked: dict[str, Any]) -> None:
    path = out / "metrics.json"
    if not path.is_file():
        return
    before = runs.read_json(path, {"data": str, "quick": bool, "seed": int}, "take the tour without --resume")
    changed = changes({"longer": 1} | before, asked)
    if changed:
        raise ValueError(
            f"{out} holds another tour ({'; '.join(changed)}): use the same options, or choose another --out"
        )


def _clear(out: Path, trained: Sequence[str]) -> None:
    """Remove the report of an earlier tour in ``out``, and the folders of the programs that it ``trained``."""
    (out / "report.html").unlink(missing_ok=True)
    for name in ("pictures", *trained):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("pictures", "checkpoints"):
        (out / name).mkdir(exist_ok=True)


def _finish(tour: Tour) -> None:
    """Write pictures, report and numbers of the results so far; then print the table."""
    print("pictures and report", flush=True)
    page = page_of(tour)
    for section in page.sections:
        for picture in section.all_pictures():
            picture.save(tour.out / "pictures")
    report.write(page, tour.out / "report.html")
    runs.write_json(tour.out / "metrics.json", tour.metrics())
    print()
    print(page.table.as_text())
    print()
    state = "" if tour.complete else "NOT COMPLETE: "
    print(f"{state}{tour.metrics()['seconds']:.0f} s; open {tour.out / 'report.html'}", flush=True)
