"""The tour: its questions against answers by hand, and the quick one as a user runs it, from start to report."""

import base64
import inspect
import io
import json
import math
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from programs import assert_same_number
from typer.testing import CliRunner

import dgm_pyro as dgm
from dgm_pyro import anomaly, cli, corruptions, representations
from dgm_pyro.catalog import build
from dgm_pyro.experiments import report
from dgm_pyro.experiments.tour import comparison, page, results, run, stops
from dgm_pyro.families.flow import nsf_autoregressive
from dgm_pyro.training import fit

REFERENCES = tuple(stop for stop in stops.DIGITS.stops if stop.reference)


@pytest.fixture(scope="module")
def digits():
    return dgm.data.load("digits"), dgm.data.load("digits", "test")


# -- anomalies and scores ----------------------------------------------------------------------------------------------


def test_shuffled_digits_keep_their_gray_levels_and_lose_their_places(digits):
    x = digits[1].x
    shuffled = corruptions.shuffle_pixels(x, seed=1)
    assert shuffled.dtype == x.dtype
    assert torch.equal(shuffled.flatten(1).sort(1).values, x.flatten(1).sort(1).values)
    moved = (shuffled != x).flatten(1).any(1)
    assert moved.all()
    assert torch.equal(shuffled, corruptions.shuffle_pixels(x, seed=1))
    assert not torch.equal(shuffled, corruptions.shuffle_pixels(x, seed=2))
    # Each image has an order of its own: two equal images come out different.
    twice = corruptions.shuffle_pixels(x[:1].expand(2, 1, 8, 8), seed=1)
    assert not torch.equal(twice[0], twice[1])


def test_noise_is_normal_rounded_and_clipped(digits):
    x = torch.full((400, 1, 8, 8), 8, dtype=torch.uint8)
    noisy = corruptions.add_noise(x, 2.0, 17).double()
    n = noisy.numel()
    # Rounding adds 1/12 to the variance; the standard error of a variance is about variance * sqrt(2 / n).
    variance = 4 + 1 / 12
    assert noisy.mean().item() == pytest.approx(8, abs=5 * math.sqrt(variance / n))
    assert noisy.var().item() == pytest.approx(variance, abs=5 * variance * math.sqrt(2 / n))
    assert torch.equal(corruptions.add_noise(digits[1].x, 0.0, 17), digits[1].x)
    extreme = corruptions.add_noise(digits[1].x, 100.0, 17)
    assert (int(extreme.min()), int(extreme.max())) == (0, 16)
    assert extreme.dtype == torch.uint8


@pytest.mark.parametrize("plan", [stops.DIGITS, stops.IMAGES], ids=["digits", "images"])
def test_the_noise_of_the_anomalies_moves_a_fifth_of_the_pixels_as_the_report_says(plan):
    x = dgm.data.load(plan.data, "test", num_data=plan.sizes[1]).x
    moved = (corruptions.add_noise(x, comparison.ANOMALY_NOISE, 17) != x).double().mean().item()
    gray = ((x > 0) & (x < 16)).double().mean().item()
    # A black pixel can only become brighter, a white one only darker.
    expected = (1 - math.erf(0.5 / comparison.ANOMALY_NOISE / math.sqrt(2))) * (gray + (1 - gray) / 2)
    assert moved == pytest.approx(expected, abs=5 * math.sqrt(expected * (1 - expected) / x.numel()))
    assert round(5 * expected) == 1


def test_auroc_counts_the_pairs_in_the_right_order():
    normal, anomalous = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.0, 2.0])
    pairs = [(a > b).double() + 0.5 * (a == b) for a in normal for b in anomalous]
    assert anomaly.auroc(normal, anomalous) == pytest.approx(torch.stack(pairs).mean().item())
    assert anomaly.auroc(normal, normal - 10) == 1
    assert anomaly.auroc(normal - 10, normal) == 0


# -- references --------------------------------------------------------------------------------------------------------


def test_independent_pixels_are_counted(digits):
    train, test = digits
    program = stops.independent_pixels(train)
    frequencies = program().base_dist.probs[0]  # (8, 8, 17)
    assert torch.allclose(frequencies.sum(-1), torch.ones(8, 8))
    count = int((train.x[:, 0, 3, 4] == 7).sum())
    assert frequencies[3, 4, 7].item() == pytest.approx((count + 0.5) / (len(train) + 8.5), rel=1e-5)
    by_hand = sum(frequencies[i, j, int(test.x[0, 0, i, j])].log() for i in range(8) for j in range(8))
    assert program.log_prob(test.x[:1]).item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert program.tractable
    assert sum(p.numel() for p in program.parameters()) == 17 * 64


def test_independent_pixels_by_class_are_the_sum_over_classes(digits):
    train, test = digits
    program = stops.independent_pixels_by_class(train)
    log_joint = []
    for y in range(10):
        part = train[train.y == y]
        log_joint.append(
            stops.independent_pixels(part).log_prob(test.x) + math.log((len(part) + 0.5) / (len(train) + 5))
        )
    log_joint = torch.stack(log_joint)
    assert torch.allclose(program.log_prob(test.x), log_joint.logsumexp(0), rtol=1e-4)
    assert torch.equal(program.classify(test.x), log_joint.argmax(0))


def test_a_diffusion_is_asked_at_all_its_times(digits):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        program = build("diffusion", digits[0])
    test = digits[1][:4]
    before = program.subsample

    def bounds(num_samples):
        return torch.tensor(
            [dgm.evaluate(program, test, num_samples=num_samples, seed=seed).nats for seed in range(20)]
        )

    few = bounds(num_samples=10)
    with results.at_all_times(program):
        assert len(program.latents("x")) == 1  # no random shift of the times
        every = bounds(num_samples=1)
    assert program.subsample == before
    # Two estimates of one bound, within four standard errors; the second has far less noise for each pass.
    error = math.hypot(few.std(), every.std()) / 20**0.5
    assert every.mean().item() == pytest.approx(few.mean().item(), abs=4 * error)
    assert every.std() < few.std()


# -- representation ----------------------------------------------------------------------------------------------------


def test_latents_are_the_posterior_mean_of_a_vae_and_the_z_of_a_flow(digits):
    x = digits[1].x[:5]
    vae = build("vae", digits[0])
    assert_same_number(representations.latents(vae, x), vae.encoder(x).mean.detach())
    flow = dgm.Dequantized(nsf_autoregressive((1, 8, 8), hidden=(16, 16), unit_cube=True), 17)
    z = representations.latents(flow, x)
    assert z.shape == (5, 64)
    centers = flow.flow.forward_map(z.reshape(5, 1, 8, 8))
    assert torch.allclose(centers, (x + 0.5) / 17, atol=1e-4)  # the inverse of splines, in single precision
    assert representations.latents(build("pixels", digits[0]), x) is None


def test_the_comparison_holds_what_the_programs_say(digits):
    train, test = digits
    generative = stops.independent_pixels_by_class(train)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        discriminative = build("classifier", train)
    compared = comparison.compare_classifiers({"generative": generative, "discriminative": discriminative}, test)
    clean = generative.class_probabilities(test.x)
    assert compared.accuracy["generative"][0] == pytest.approx((clean.argmax(1) == test.y).double().mean().item())
    assert compared.confidence["generative"][0] == pytest.approx(clean.max(1).values.mean().item(), abs=1e-6)
    assert compared.log_p[0] == pytest.approx(dgm.evaluate(generative, test).nats, rel=1e-5)
    assert compared.alarm[0] == pytest.approx(comparison.FALSE_ALARMS, abs=1 / len(test))
    noisy = corruptions.add_noise(test.x, comparison.NOISE[2], 17)
    assert compared.log_p[2] == pytest.approx(generative.log_prob(noisy).mean().item(), rel=1e-5)
    assert set(compared.accuracy) == set(compared.confidence) == {"generative", "discriminative"}
    assert all(len(values) == len(comparison.NOISE) for values in compared.accuracy.values())
    shuffled = generative.class_probabilities(corruptions.shuffle_pixels(test.x)).max(1).values
    assert compared.shuffled["generative"] == pytest.approx(shuffled.mean().item(), abs=1e-6)
    for name, probabilities in compared.probabilities.items():
        right = (probabilities.argmax(1) == compared.y).double().reshape(len(comparison.NOISE), -1).mean(1)
        assert right.tolist() == pytest.approx(compared.accuracy[name])
    assert json.dumps(compared.metrics(), allow_nan=False)


# -- what happens when something happens -------------------------------------------------------------------------------


def test_an_interrupted_tour_reports_what_it_has(tmp_path, capsys):
    def interrupt(data):
        raise KeyboardInterrupt

    visited = (REFERENCES[0], stops.Stop("never", "never", "vae", interrupt), REFERENCES[1])
    with pytest.raises(KeyboardInterrupt):
        run.run(tmp_path / "tour", quick=True, device="cpu", stops=visited)
    metrics = json.loads((tmp_path / "tour" / "metrics.json").read_text())
    assert [program["name"] for program in metrics["programs"]] == ["pixels"]
    assert metrics["complete"] is False
    assert "1 of 3 programs" in (tmp_path / "tour" / "report.html").read_text()
    assert "NOT COMPLETE" in capsys.readouterr().out


def test_a_failed_training_is_told_and_the_tour_goes_on(tmp_path, capsys):
    broken = stops.Stop("vae", "VAE", "vae", stops.DIGITS.stops[5].make, {"epochs": 3, "lr": 1e30}, quick_epochs=3)
    failures = run.run(tmp_path, quick=True, device="cpu", stops=(broken, *REFERENCES))
    (failure,) = failures
    assert failure.startswith("VAE: ")
    assert "not finite" in failure
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [program["name"] for program in metrics["programs"]] == ["pixels", "pixels-by-class"]
    assert metrics["failures"] == failures
    assert "not finite" in (tmp_path / "report.html").read_text()


def test_an_earlier_tour_is_replaced_and_nothing_else_is(tmp_path):
    run.run(tmp_path / "tour", quick=True, device="cpu", stops=REFERENCES)
    first = json.loads((tmp_path / "tour" / "metrics.json").read_text())
    run.run(tmp_path / "tour", quick=True, device="cpu", stops=REFERENCES[:1])
    again = json.loads((tmp_path / "tour" / "metrics.json").read_text())
    assert len(first["programs"]) == 2
    assert len(again["programs"]) == 1
    assert again["programs"][0]["bits_per_dim"] == first["programs"][0]["bits_per_dim"]
    assert not (tmp_path / "tour" / "checkpoints" / "pixels-by-class").exists()
    assert not list((tmp_path / "tour" / "pictures").glob("pixels-by-class*"))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="no tour"):
        run.run(tmp_path / "thesis", stops=REFERENCES)
    with pytest.raises(FileExistsError, match="is a file"):
        run.run(tmp_path / "thesis" / "chapter.tex", stops=REFERENCES)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def test_an_interrupted_tour_is_resumed(tmp_path, monkeypatch, capsys):
    """What it had trained stays; the training that was interrupted continues, to the same weights."""
    recipe = {"epochs": 4, "lr": 1e-3}
    trained = stops.Stop("made", "MADE", "autoregressive", stops.DIGITS.stops[2].make, recipe, quick_epochs=2)
    visited = (REFERENCES[0], trained, REFERENCES[1])
    tour, options = tmp_path / "tour", {"quick": True, "longer": 2, "device": "cpu", "stops": visited}
    run.run(tmp_path / "whole", **options)
    gradient, steps = fit.Training._gradient, []

    def signaled(self, *arguments):
        steps.append(1)
        if len(steps) == 30:
            signal.raise_signal(signal.SIGTERM)
        return gradient(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(fit.Training, "_gradient", signaled)
        with pytest.raises(
            KeyboardInterrupt, match=f"of 84, .*resume with dgm tour --quick --longer 2 --out {tour} --"
        ):
            run.run(tour, **options)
    assert json.loads((tour / "metrics.json").read_text())["complete"] is False
    with pytest.raises(ValueError, match=r"holds another tour .seed was 0 and is now 1."):
        run.run(tour, **options, resume=True, seed=1)
    with pytest.raises(ValueError, match=r"holds another tour .longer was 2 and is now 1."):
        run.run(tour, **options | {"longer": 1}, resume=True)
    with pytest.raises(ValueError, match=r"holds another tour .data was 'digits' and is now 'glyphs-digits'."):
        run.run(tour, images=True, **options, resume=True)
    kept = (tour / "checkpoints" / "pixels" / "run.json").stat().st_mtime_ns
    steps.clear()
    monkeypatch.setattr(fit.Training, "_gradient", lambda *a: steps.append(1) or gradient(*a))
    run.run(tour, **options, resume=True)
    assert len(steps) == 54
    assert (tour / "checkpoints" / "pixels" / "run.json").stat().st_mtime_ns == kept
    names = [
        sorted(path.name for path in (each / "checkpoints" / "made").iterdir()) for each in (tour, tmp_path / "whole")
    ]
    assert names[0] == names[1]  # the weights among them, by their digest
    assert (tour / "report.html").is_file()
    steps.clear()
    capsys.readouterr()
    run.run(tour, **options, resume=True)
    assert "trained earlier in" in capsys.readouterr().out
    assert not steps


@pytest.mark.parametrize("plan", [stops.DIGITS, stops.IMAGES], ids=["digits", "images"])
def test_recipes_are_complete(plan):
    for stop in plan.stops:
        if stop.reference:
            assert stop.options(quick=True) is None
            continue
        full, quick = stop.options(quick=False), stop.options(quick=True)
        assert 0 < quick["epochs"] < full["epochs"]
        assert stop.options(quick=False, longer=3)["epochs"] == 3 * full["epochs"]
        assert {name: value for name, value in quick.items() if name != "epochs"} == {
            name: value for name, value in full.items() if name != "epochs"
        }
    assert len({stop.name for stop in plan.stops}) == len(plan.stops)
    assert {stop.family for stop in plan.stops} >= set(page.FAMILIES)
    assert set(dgm.data.load(plan.data, num_data=100).y.tolist()) == set(range(10))


def test_every_text_of_the_report_is_used_and_needs_no_other():
    source = inspect.getsource(page)
    names = {
        name for name, value in vars(report.environment().get_template("tour.j2").module).items() if callable(value)
    }
    asked = {name for name in re.findall(r'"(\w+)"', source) if name in names}
    asked |= {f"{text}_alt" for text in asked | {*re.findall(r'^ +"(\w+)",$', source, re.MULTILINE)}} & names
    asked |= {f"{family}{part}" for family in page.FAMILIES for part in ("", "_title", "_formula")}
    assert asked == names - {"said"}  # which the template itself uses


def test_a_text_of_the_report_is_paragraphs_of_one_line_whose_values_are_escaped():
    tour = SimpleNamespace(latent_size=5)
    first, second = page.paragraphs("vae", tour)
    assert first.startswith("<strong>How p(x) is represented.</strong> As an integral over 5 latents z")
    assert "\n" not in first + second
    assert page.words("program_scores_alt", "a < b").startswith("Histograms of log p(x) under a &lt; b for")
    assert page.words("program_latents_caption", None) == ""
    shares = comparison.ClassifierComparison(
        accuracy={"generative": [0.9, 0.5, 0.3], "discriminative": [0.8, 0.4, 0.2]},
        confidence={"generative": [0.99, 0.7, 0.6], "discriminative": [0.98, 0.97, 0.96]},
        alarm=[0.05, 0.6, 1.0],
        shuffled={"generative": 0.71, "discriminative": 0.72},
    )
    _, numbers, alarm = page.paragraphs("classifiers", shares, (0.0, 1.0, 4.0))
    assert "an accuracy of 90%, the discriminative one of 80%" in numbers
    assert "At a noise of 1 gray levels the generative one is 50% accurate at a confidence of 70%, the" in numbers
    assert "At 4 they are 30% accurate at a confidence of 60%, and 20% accurate at a confidence of 96%." in numbers
    assert "their confidence is 71% and 72%." in numbers
    assert "for 60% of the digits at a noise of 1, for 100% at 4 and for 100% at 4" in alarm


# -- from start to report ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The quick tour, as a user runs it."""
    out = tmp_path_factory.mktemp("user") / "tour"
    command = [sys.executable, "-m", "dgm_pyro", "tour", "--quick", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return out, done.stdout, json.loads((out / "metrics.json").read_text())


def test_the_quick_tour_visits_every_family(quick):
    _, _, metrics = quick
    assert metrics["complete"]
    assert metrics["failures"] == []
    assert [program["name"] for program in metrics["programs"]] == [stop.name for stop in stops.DIGITS.stops]
    assert {program["family"] for program in metrics["programs"]} >= set(page.FAMILIES)
    assert {"torch", "pyro-ppl", "dgm_pyro", "python"} <= set(metrics["versions"])
    assert (metrics["seed"], metrics["device"], metrics["quick"]) == (0, "cpu", True)


def test_its_numbers_are_plausible(quick):
    _, _, metrics = quick
    programs = {program["name"]: program for program in metrics["programs"]}
    assert programs["pixels"]["bits_per_dim"] == pytest.approx(2.43, abs=0.01)
    assert programs["pixels-by-class"]["bits_per_dim"] == pytest.approx(2.22, abs=0.01)
    assert programs["pixels-by-class"]["accuracy"] == pytest.approx(0.88, abs=0.01)
    for name, program in programs.items():
        if name == "discriminative-classifier":
            assert program["bits_per_dim"] is None
            continue
        # Better than pixels on their own, and not better than what long training reaches.
        assert 1.65 < program["bits_per_dim"] < 2.44
        assert 0 < program["stderr"] < 0.05
        assert program["kind"] == "exact" or re.fullmatch(r"elbo|iwae-\d+", program["kind"])
        assert program["measure"] == "mass"
        assert program["num_data"] == stops.DIGITS.quick_sizes[1]
        assert set(program["auroc"]) == {comparison.SHUFFLED, comparison.NOISY}
        assert program["auroc"][comparison.SHUFFLED] > 0.9
        assert 0.5 < program["auroc"][comparison.NOISY] <= 1
        assert program["parameters"] > 0
        assert program["seconds"] > 0 or program["reference"]
    assert {name for name, program in programs.items() if program["probe"] is not None} == {"flow", "vae", "vae-flow"}
    assert all(programs[name]["probe"] > 0.8 for name in ("vae", "vae-flow"))
    assert programs["discriminative-classifier"]["accuracy"] > 0.9
    assert programs["generative-classifier"]["accuracy"] > 0.5
    assert metrics["probe_of_pixels"] > 0.94
    alarm = metrics["classifiers"]["alarm"]
    assert alarm[0] < 0.06
    assert alarm[-1] > 0.95


def test_its_table_has_the_errors_over_the_test_digits(quick):
    out, printed, metrics = quick
    test = dgm.data.load("digits", "test")[: stops.DIGITS.quick_sizes[1]]
    by_class = next(program for program in metrics["programs"] if program["name"] == "pixels-by-class")
    loaded = dgm.load(out / by_class["checkpoint"])
    right = (loaded.classify(test.x) == test.y).double()
    error = right.std(unbiased=False).item() / len(test) ** 0.5
    (line,) = (line for line in printed.splitlines() if line.startswith(by_class["title"]))
    assert f"{right.mean().item():.2f} ± {error:.2f}" in line
    noisy = dgm.evaluate(loaded, corruptions.add_noise(test.x, comparison.ANOMALY_NOISE, 17)).values
    # The share of noisy digits below each digit, and of digits above each noisy one: their variances (DeLong).
    clean = dgm.evaluate(loaded, test).values
    wins = (clean[:, None] > noisy).double() + 0.5 * (clean[:, None] == noisy)
    error = math.sqrt(sum(each.var().item() / len(test) for each in (wins.mean(0), wins.mean(1))))
    assert by_class["auroc_stderr"][comparison.NOISY] == pytest.approx(error, rel=1e-6)
    assert f"{wins.mean().item():.3f} ± {error:.3f}" in line


def test_its_checkpoints_are_the_programs_in_the_table(quick):
    out, _, metrics = quick
    test = dgm.data.load("digits", "test")[: stops.DIGITS.quick_sizes[1]]
    for program in metrics["programs"]:
        loaded = dgm.load(out / program["checkpoint"])
        assert sum(p.numel() for p in loaded.parameters()) == program["parameters"]
        if program["kind"] == "exact":
            assert dgm.evaluate(loaded, test).bits_per_dim == pytest.approx(program["bits_per_dim"], abs=1e-5)


def test_its_report_stands_alone(quick):
    out, _, metrics = quick
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "//" not in re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)
    embedded = re.findall(r'src="data:image/png;base64,([A-Za-z0-9+/=]+)"', text)
    saved = {path.read_bytes() for path in (out / "pictures").glob("*.png")}
    assert {base64.b64decode(picture) for picture in embedded} == saved
    assert len(saved) == len(embedded) > 20
    for picture in saved:
        with Image.open(io.BytesIO(picture)) as image:
            assert image.convert("L").getextrema()[0] < 100, "a picture is blank"
    for program in metrics["programs"]:
        assert program["title"] in text
        if program["bits_per_dim"] is not None:
            assert f"{program['bits_per_dim']:.2f}" in text
        if not program["reference"]:  # those are in the table alone
            assert dgm.load(out / program["checkpoint"]).formula().html() in text
    for family in page.FAMILIES:
        assert page.words(f"{family}_title") in text
    assert "quick tour" in text
    anchors = re.findall(r'<section id="([^"]+)"', text)
    assert len(anchors) == len({*anchors})
    counted = min(p["bits_per_dim"] for p in metrics["programs"] if p["reference"])
    assert f"Counting has {counted:.2f}." in " ".join(text.split())


def test_it_prints_a_table_and_where_to_look(quick):
    out, printed, metrics = quick
    lines = printed.rstrip().splitlines()
    assert lines[-1].endswith(f"open {out / 'report.html'}")
    for program in metrics["programs"]:
        assert any(line.startswith(program["title"]) for line in lines)


# -- of larger images --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick_images(tmp_path_factory):
    """A reference and the VAE of the quick tour of images: the page, its numbers and what was trained."""
    out = tmp_path_factory.mktemp("images") / "tour"
    visited = [stop for stop in stops.IMAGES.stops if stop.name in ("pixels-by-class", "vae")]
    assert run.run(out, images=True, quick=True, device="cpu", stops=visited) == []
    return out, json.loads((out / "metrics.json").read_text())


def test_the_command_asks_for_images(monkeypatch):
    asked = []
    monkeypatch.setattr(run, "run", lambda out, **options: asked.append(options["images"]) or [])
    for options in ([], ["--images"]):
        assert CliRunner().invoke(cli.app, ["tour", *options]).exit_code == 0
    assert asked == [False, True]


def test_a_tour_of_images_scores_the_images_that_it_names(quick_images):
    out, metrics = quick_images
    plan = stops.IMAGES
    (num_train, num_test), (quick_train, quick_test) = plan.sizes, plan.quick_sizes
    assert (metrics["data"], metrics["num_test"]) == (plan.data, quick_test)
    test = dgm.data.load(plan.data, "test", num_data=num_test)[:quick_test]
    counted = stops.independent_pixels_by_class(dgm.data.load(plan.data, num_data=num_train)[:quick_train])
    by_class, vae = metrics["programs"]
    assert by_class["bits_per_dim"] == pytest.approx(dgm.evaluate(counted, test).bits_per_dim, abs=1e-6)
    loaded = dgm.load(out / "checkpoints" / "vae")
    assert loaded.event_shape == (1, 28, 28)
    assert vae["parameters"] == sum(p.numel() for p in loaded.parameters())
    record = json.loads((out / "checkpoints" / "vae" / "run.json").read_text())
    assert record["data"] == plan.data


def test_the_page_of_a_tour_of_images_names_their_size_and_shows_reconstructions(quick_images):
    out, _ = quick_images
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "28 x 28 digits" in text
    assert "8 x 8" not in text.replace("28 x 28", "")
    assert f"/ {28 * 28}" in text
    assert f"dgm tour --images --quick --out {out}" in text
    assert "an integral over 64 latents z" in text
    assert (out / "pictures" / "vae-reconstructions.png").is_file()
    assert "flow prior" not in text


def test_reconstructions_are_the_rounded_means_of_the_likelihood(quick_images):
    out, _ = quick_images
    vae = dgm.load(out / "checkpoints" / "vae")
    tour = results.Tour(out, quick=True, seed=0, device=torch.device("cpu"), plan=stops.IMAGES)
    (stop,) = (stop for stop in stops.IMAGES.stops if stop.name == "vae")
    shown = tour.visit(stop).reconstructions
    x = tour.test.x[: results.NUM_SHOWN]
    with torch.no_grad():
        pixels = vae.likelihood(vae.encoder(x).mean).base_dist
        mean = sum(level * pixels.log_prob(torch.full_like(x, level)).exp() for level in range(17))
    assert shown.dtype == torch.uint8
    assert (shown - mean).abs().max() < 0.501
