"""What is in the pictures: every array, point and line that was handed in is there, finite, and in the right place."""

import io
import itertools
import math

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

import dgm_pyro as dgm
from dgm_pyro import Normal, plots
from dgm_pyro.evaluation import Evidence
from dgm_pyro.infer.draws import PredictiveCheck
from dgm_pyro.training.fit import Epoch, History


def lines_of(axes):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def evidence(bits, kind="exact", measure="mass", spread=0.0):
    nats = -bits * 4 * math.log(2)
    return Evidence(torch.tensor([nats - spread, nats + spread]).double(), kind, measure, num_dims=4)


def history(kl=False, validation=True, num=12):
    def epoch(i):
        terms = ({"x": -10.0 / i}, {"z": 0.5 * i}) if kl else ({}, {})
        return Epoch(i, 10.0 / i, *terms, 12.0 / i if validation else None, float(i))

    return History([epoch(i) for i in range(1, num + 1)], best_epoch=num - 1)


# -- themes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["light", "dark"])
def test_a_theme_colors_the_paper_and_the_ink_and_leaves_matplotlib_as_it_was(name):
    before = dict(matplotlib.rcParams)
    with plots.theme(name) as theme:
        figure = plots.curves([0, 1], {"loss": {"a": [1, 2]}}, xlabel="epoch")
        assert matplotlib.colors.to_hex(figure.get_facecolor()) == theme.paper
        assert matplotlib.colors.to_hex(figure.axes[0].yaxis.label.get_color()) == theme.ink
    assert dict(matplotlib.rcParams) == before
    content = io.BytesIO()
    figure.savefig(content)
    corner = Image.open(content).convert("RGB").getpixel((0, 0))
    assert corner == tuple(round(255 * c) for c in matplotlib.colors.to_rgb(theme.paper))


def test_text_and_lines_stand_out_from_the_paper():
    def luminance(color):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in matplotlib.colors.to_rgb(color)]
        return np.dot([0.2126, 0.7152, 0.0722], linear)

    def contrast(a, b):
        low, high = sorted([luminance(a), luminance(b)])
        return (high + 0.05) / (low + 0.05)

    for theme in plots.THEMES.values():
        assert contrast(theme.ink, theme.paper) > 12
        assert contrast(theme.muted, theme.paper) > 4.5  # WCAG AA for small text
        assert min(contrast(color, theme.paper) for color in theme.series) > 3  # WCAG AA for graphics
        assert len(set(theme.classes)) == 10


# -- samples -----------------------------------------------------------------------------------------------------------


def test_images_are_laid_out_row_after_row_with_gaps():
    x = torch.arange(6).reshape(6, 1, 1, 1).expand(6, 1, 2, 2)
    figure = plots.images(
        x, levels=6, num_columns=3, title="Six", column_labels=["a", "b", "c"], row_labels=["up", "down"]
    )
    (axes,) = figure.axes
    (image,) = axes.get_images()
    mosaic = np.ma.filled(image.get_array().astype(float), np.nan)
    assert mosaic.shape == (5, 8)
    assert np.array_equal(5 * mosaic[0, [0, 3, 6]], [0, 1, 2])
    np.testing.assert_allclose(5 * mosaic[3, [0, 3, 6]], [3, 4, 5], rtol=1e-12)
    assert np.isnan(mosaic[2]).all()
    assert np.isnan(mosaic[:, 2]).all()
    assert image.get_clim() == (0, 1)
    assert [text.get_text() for text in axes.texts] == ["up", "down", "a", "b", "c"]
    assert figure.texts[0].get_text() == "Six"
    assert len(axes.patches) == 6
    assert not axes.axison


def test_images_of_three_channels_are_drawn_in_their_colors():
    x = torch.randint(256, (2, 3, 4, 5))
    covered = torch.zeros(2, 3, 4, 5, dtype=torch.bool)
    covered[1, 2, 3, 4] = True
    with plots.theme("dark") as theme:
        figure = plots.samples(x, levels=256)
        plots.images(x, levels=256, covered=covered)
    mosaic = np.asarray(figure.axes[0].get_images()[0].get_array())
    assert np.array_equal((255 * mosaic[:, 6:]).round(), x[1].permute(1, 2, 0).numpy())
    assert matplotlib.colors.to_hex(mosaic[0, 5]) == theme.paper


def test_level_zero_is_paper_and_the_highest_level_ink():
    with plots.theme("dark") as theme:
        figure = plots.images(torch.tensor([0, 16]).reshape(2, 1, 1, 1), levels=17)
    colors = figure.axes[0].get_images()[0].cmap([0.0, 1.0])
    assert [matplotlib.colors.to_hex(color) for color in colors] == [theme.paper, theme.ink]


@pytest.mark.parametrize("name", ["light", "dark"])
def test_level_zero_of_a_photograph_is_black_and_the_highest_level_white(name):
    with plots.photographs(), plots.theme(name):
        drawn = plots.images(torch.tensor([0, 16]).reshape(2, 1, 1, 1), levels=17).axes[0].images[0]
    shades = drawn.to_rgba(drawn.get_array())[0, [0, 2], :3]
    assert shades.tolist() == [[0, 0, 0], [1, 1, 1]]


def test_badges_of_classes_in_one_place_do_not_cover_each_other():
    torch.manual_seed(0)
    z = torch.randn(300, 2) * torch.tensor([[1.0, 1.0], [1e-3, 1e-3]])[(torch.arange(300) < 290).long()]
    figure = plots.latent_map(z.abs(), torch.arange(300) % 10)  # most of them in one corner
    FigureCanvasAgg(figure).draw()
    [axes] = figure.axes
    boxes = [text.get_bbox_patch().get_window_extent() for text in axes.texts]
    assert sorted(text.get_text() for text in axes.texts) == [str(label) for label in range(10)]
    centers = np.array([[(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2] for box in boxes])
    distance = np.linalg.norm(centers[:, None] - centers, axis=-1)[np.triu_indices(10, 1)]
    assert distance.min() > 0.95 * max(box.width for box in boxes)
    frame = axes.get_window_extent()
    assert all(frame.contains(*center) for center in centers)


@pytest.mark.parametrize("shape", [(4, 2, 8, 8), (4, 8, 8), (0, 1, 8, 8)])
def test_images_refuse_what_is_none(shape):
    with pytest.raises(ValueError, match="images are"):
        plots.images(torch.zeros(shape))


def test_the_plane_shows_every_sample_over_the_density():
    points = torch.randn(50, 2)
    normal = Normal(2)
    figure = plots.plane(points, log_density=normal.log_prob, limits=(-3, 3), resolution=61)
    axes = figure.axes[0]
    assert np.allclose(axes.collections[0].get_offsets(), points.numpy())
    density = axes.get_images()[0].get_array()
    assert density.shape == (61, 61)
    assert density[30, 30] == pytest.approx(1 / (2 * math.pi))
    assert tuple(axes.get_images()[0].get_extent()) == (-3, 3, -3, 3)
    assert "density" in figure.axes[1].get_ylabel()


def test_the_density_is_not_transposed():
    figure = plots.plane(
        log_density=lambda x: -((x - torch.tensor([2.0, -1.0])) ** 2).sum(-1), limits=(-3, 3), resolution=61
    )
    row, column = np.unravel_index(figure.axes[0].get_images()[0].get_array().argmax(), (61, 61))
    assert (column / 10 - 3, row / 10 - 3) == pytest.approx((2, -1))


def test_the_plane_refuses_what_is_no_plane():
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.plane()
    with pytest.raises(ValueError, match=r"\(N, 2\)"):
        plots.plane(torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("x", "levels", "kind"),
    [(torch.zeros(4, 1, 8, 8), 17, "mosaic"), (torch.zeros(4, 2), None, "points"), (torch.zeros(4, 16), 2, "table")],
)
def test_samples_are_drawn_in_the_form_that_suits_their_shape(x, levels, kind):
    axes = plots.samples(x, levels=levels, title="t").axes[0]
    shown = "points" if axes.collections else "table" if axes.get_xlabel() == "feature" else "mosaic"
    assert shown == kind


# -- training ----------------------------------------------------------------------------------------------------------


def test_learning_curves_hold_the_losses_and_mark_the_best_epoch():
    figure = plots.learning_curves(history(), title="t")
    (axes,) = figure.axes
    lines = lines_of(axes)
    assert lines["training"] == (list(range(1, 13)), [10.0 / i for i in range(1, 13)])
    assert lines["validation"] == (list(range(1, 13)), [12.0 / i for i in range(1, 13)])
    assert lines["best epoch"][0] == [11, 11]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training", "validation", "best epoch"]
    assert axes.get_xlabel() == "epoch"
    assert "nats" in axes.get_ylabel()


def test_reconstruction_and_kl_are_shown_apart():
    figure = plots.learning_curves(history(kl=True))
    top, below = figure.axes
    assert set(lines_of(below)) == {"reconstruction of x", "KL of z"}
    assert lines_of(below)["KL of z"][1] == [0.5 * i for i in range(1, 13)]
    assert lines_of(below)["reconstruction of x"][1] == [10.0 / i for i in range(1, 13)]
    assert below.get_xlabel() == "epoch"
    assert "training" in lines_of(top)


def test_the_many_terms_of_a_chain_are_its_largest_and_the_sum_of_the_others():
    kl = {f"x_{t}": float(t) for t in range(1, 21)}
    figure = plots.learning_curves(History([Epoch(i, 5.0, {"x": -100.0}, kl, None, 1.0) for i in (1, 2)], 2))
    lines = lines_of(figure.axes[1])
    assert len(lines) == plots.MOST_TERMS
    assert {"reconstruction of x", "KL of x_20", "KL of x_15"} < set(lines)
    assert lines["sum of 14 smaller terms"][1] == [sum(range(1, 15))] * 2
    assert sum(values[0] for _, values in lines.values()) == 100 + sum(kl.values())


def test_sites_of_factors_are_named_by_what_they_state_and_left_out_if_they_state_nothing():
    terms = ({"x_likelihood": -2.0, "x": 0.0}, {"x_t": 0.0, "x_kl": 3.0})
    figure = plots.learning_curves(History([Epoch(i, 5.0, *terms, None, 1.0) for i in (1, 2)], 2))
    assert lines_of(figure.axes[1]) == {"reconstruction of x": ([1, 2], [2, 2]), "KL of x": ([1, 2], [3, 3])}


def test_no_term_hides_another_of_a_similar_name():
    """A diffusion as the prior of z has the terms z and z_kl."""
    kl = {"z": -19.6, "z_kl": 80.3, "z_T_kl": 0.1}
    figure = plots.learning_curves(History([Epoch(i, 5.0, {"x": -100.0}, kl, None, 1.0) for i in (1, 2)], 2))
    lines = lines_of(figure.axes[1])
    assert set(lines) == {"reconstruction of x", "KL of z", "KL of z_kl", "KL of z_T"}
    assert sum(values[0] for _, values in lines.values()) == pytest.approx(100 + sum(kl.values()))


def test_a_single_term_is_the_loss_itself_and_needs_no_panel():
    figure = plots.learning_curves(History([Epoch(i, 3.0, {"x": 0.0}, {"z": 3.0}, None, 1.0) for i in (1, 2)], 2))
    assert len(figure.axes) == 1


def test_a_first_loss_far_above_the_rest_does_not_flatten_it():
    losses = [1e6, *(100.0 - i for i in range(20))]
    figure = plots.learning_curves(History([Epoch(i, loss, {}, {}, None, 1.0) for i, loss in enumerate(losses, 1)], 2))
    low, high = figure.axes[0].get_ylim()
    assert low < 81
    assert 100 < high < 200


def test_a_long_title_takes_several_lines_and_stays_within_the_width():
    figure = plots.curves(
        [0, 1], {"loss": {"a": [1, 2]}}, xlabel="epoch", title="PixelCNN has the last word of many programs. " * 3
    )
    assert figure.get_suptitle().count("\n") == 2
    figure.canvas.draw()
    box = figure._suptitle.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width


def test_without_validation_there_is_no_line_for_it():
    assert set(lines_of(plots.learning_curves(history(validation=False)).axes[0])) == {"training"}


def test_an_empty_history_is_refused():
    with pytest.raises(ValueError, match="no epochs"):
        plots.learning_curves(History())


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_bits_per_dim_are_dots_with_two_standard_errors():
    evidences = {"a": evidence(2.0, spread=1.0), "b": evidence(1.5, kind="elbo", spread=1.0)}
    figure = plots.bits_per_dim(evidences, reference=2.25, reference_label="beat this", title="t")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    dots = [line for line in axes.get_lines() if line.get_marker() == "o"]
    assert [(float(d.get_xdata()[0]), float(d.get_ydata()[0])) for d in dots] == [
        pytest.approx((2.0, 0)),
        pytest.approx((1.5, 1)),
    ]
    full, open_ = (matplotlib.colors.to_hex(d.get_markerfacecolor()) for d in dots)
    assert full == plots.THEMES["light"].series[0]
    assert open_ == plots.THEMES["light"].paper
    bar = axes.containers[0].lines[2][0].get_segments()[0]
    assert bar[:, 0] == pytest.approx([2.0 - 2 * evidences["a"].stderr, 2.0 + 2 * evidences["a"].stderr])
    texts = [text.get_text() for text in axes.texts]
    assert "2.00" in texts
    assert "1.50" in texts
    assert "beat this" in texts
    assert [2.25, 2.25] in [list(line.get_xdata()) for line in axes.get_lines()]
    assert "bounds" in axes.get_xlabel()
    assert axes.yaxis_inverted()


def test_masses_and_densities_do_not_share_an_axis():
    with pytest.raises(ValueError, match="not comparable"):
        plots.bits_per_dim({"a": evidence(1.0), "b": evidence(1.0, measure="density")})
    with pytest.raises(ValueError, match="empty"):
        plots.bits_per_dim({})


def test_auroc_has_a_mark_for_each_kind_and_program():
    figure = plots.aurocs({"a": {"noise": 0.9, "shuffled": 1.0}, "b": {"noise": 0.7}}, title="t")
    lines = lines_of(figure.axes[0])
    assert lines["noise"] == ([0.9, 0.7], [0, 1])
    assert lines["shuffled"] == ([1.0], [0])
    low, high = figure.axes[0].get_xlim()
    assert low < 0.5
    assert high > 1
    with pytest.raises(ValueError, match="empty"):
        plots.aurocs({})


def test_imputed_points_are_points():
    x, draws = torch.randn(5, 2), torch.randn(3, 5, 2)
    seen = torch.tensor([True, False])
    draws[..., 0] = x[:, 0]
    figure = plots.imputations(x, seen, draws, title="t")
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == 5
    for i, axes in enumerate(panels):
        line, drawn, datum = axes.get_lines()
        assert np.allclose(line.get_xdata(), x[i, 0])
        assert np.allclose(np.array(drawn.get_data()).T, draws[:, i])
        assert np.allclose(np.array(datum.get_data())[:, 0], x[i])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["draws", "data (dotted: seen)"]
    assert not any(axes.images for axes in figure.axes)
    each = torch.eye(2, dtype=torch.bool)[[0, 1, 0, 1, 0]]  # another coordinate of each datum
    figure = plots.imputations(x, each, draws)
    assert [len(axes.get_lines()) for axes in figure.axes[:5]] == [3] * 5
    second = figure.axes[1].get_lines()[0]
    assert np.allclose(second.get_ydata(), x[1, 1])


def test_columns_have_histograms_in_their_own_units():
    x = torch.stack([torch.randn(90) * 1e5, torch.randint(4, (90,)).float()], 1)
    marked = torch.arange(90) < 2
    figure = plots.by_column(x, ["pressure", "cars"], marked=marked)
    bins = (18, [-0.5, 0.5, 1.5, 2.5, 3.5])  # a bar for each whole number
    for values, name, edges, axes in zip(x.T, ("pressure", "cars"), bins, figure.axes, strict=False):
        assert axes.get_xlabel() == name
        heights = [bar.get_height() for bar in axes.patches]
        assert heights == np.histogram(values.double().numpy(), edges)[0].tolist()
        assert sum(heights) == 90
        assert [line.get_xdata()[0] for line in axes.get_lines()] == pytest.approx(values[:2].tolist())
    with pytest.raises(ValueError, match=r"columns has 1 names, but x has shape \(90, 2\)"):
        plots.samples(x, columns=["pressure"])


def ticks(axes):
    return {
        int(place): label.get_text() for place, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    }


def test_categories_are_drawn_with_their_words():
    """At the number that x has for each word, also for a word that no row has, and for no other column."""
    x, words = torch.tensor([[0.0, 2.0], [2.0, 5.0], [2.0, 7.0]]), {"tree": ["oak", "birch", "pine"]}
    columns, seen = ["tree", "age in $ or $"], torch.zeros(2, dtype=torch.bool)
    for figure in (
        plots.samples(x, columns=columns, words=words),
        plots.imputations(x, seen, x[None], columns=columns, words=words),
    ):
        tree, age = figure.axes[:2]
        assert ticks(tree) == {0: "oak", 1: "birch", 2: "pine"}
        assert not set(ticks(age).values()) & {"oak", "birch", "pine"}
        assert not age.xaxis.label.get_parse_math()


@pytest.mark.parametrize("width", [4, 40])
def test_words_of_a_category_do_not_overlap(width):
    words = [f"{i:03d}".ljust(width, "x") for i in range(100)]
    figure = plots.by_column(torch.arange(100.0)[:, None].expand(-1, 3), ["a", "b", "c"], words={"b": words})
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [label.get_window_extent(canvas.get_renderer()) for label in figure.axes[1].get_xticklabels()]
    assert len(boxes) >= 5
    assert all(words[place].startswith(shown.rstrip(".") or "-") for place, shown in ticks(figure.axes[1]).items())
    assert all(left.x1 <= right.x0 for left, right in itertools.pairwise(boxes))


def test_predicted_counts_have_bins_of_equally_many_whole_numbers():
    y, drawn = torch.tensor([1.0, 1.0, 2.0, 6.0]), torch.tensor([[0.0, 2.0, 4.0, 9.0]] * 3)
    found = PredictiveCheck("prior", {"y": y}, {"y": drawn})
    for bins, edges, shares in (
        (20, [i - 0.5 for i in range(11)], [0, 2, 1, 0, 0, 0, 1, 0, 0, 0]),
        (5, [-0.5, 1.5, 3.5, 5.5, 7.5, 9.5], [2, 1, 0, 1, 0]),
    ):
        data = plots.predictions(found, bins=bins).axes[0].patches[-1].get_data()
        assert data.edges.tolist() == edges
        assert (4 * data.values).tolist() == shares


def test_counts_beyond_64_bits_have_bins():
    y, drawn = torch.tensor([1.0, 1.0, 2.0, 1e22]), torch.tensor([[0.0, 2.0, 1e22, 1e22]] * 3)
    shown = plots.predictions(PredictiveCheck("prior", {"y": y}, {"y": drawn}), bins=4).axes[0].patches[-1].get_data()
    assert (4 * shown.values).tolist() == [3, 0, 0, 1]
    counts = [bar.get_height() for bar in plots.by_column(y[:, None].double(), ["count"]).axes[0].patches]
    assert (counts[0], counts[-1], sum(counts)) == (3, 1, 4)


def test_imputed_columns_show_what_was_observed_and_the_draws():
    x, seen, draws = torch.randn(4, 2) * 50, torch.tensor([True, False]), torch.randn(3, 4, 2)
    figure = plots.imputations(x, seen, draws, columns=["a", "b"])
    known, drawn = (dict(zip(("observed", "draws"), axes.get_lines(), strict=True)) for axes in figure.axes[:2])
    assert known["observed"].get_xdata().tolist() == pytest.approx(x[:, 0].tolist())
    assert not len(known["draws"].get_xdata())
    assert drawn["draws"].get_xdata().tolist() == pytest.approx(draws[:, :, 1].flatten().tolist())
    assert drawn["draws"].get_ydata().tolist() == [0, 1, 2, 3] * 3


def test_imputed_columns_are_those_that_miss_most():
    x, seen = torch.randn(6, 20), torch.ones(6, 20, dtype=torch.bool)
    seen[:3, 17], seen[:2, 4], seen[:1, 9] = False, False, False
    names = [f"c{i}" for i in range(20)]
    for most, wanted in ((3, ["c4", "c9", "c17"]), (1, ["c17"]), (4, ["c0", "c4", "c9", "c17"])):
        figure = plots.imputations(x, seen, torch.randn(2, 6, 20), columns=names, most=most)
        drawn = [axes for axes in figure.axes if axes.get_visible()]
        assert [axes.get_xlabel() for axes in drawn] == wanted
    assert len(drawn[-1].get_lines()[1].get_xdata()) == 3 * 2  # draws of three rows
    figure = plots.imputations(x, seen, torch.randn(2, 6, 20), columns=names)
    assert len(figure.axes) == plots.MOST_COLUMNS


def test_score_histograms_hold_all_the_data_on_common_bins():
    scores = {"digits": torch.randn(200), "noise": torch.randn(100) - 5}
    axes = plots.score_histograms(scores, bins=20).axes[0]
    for patch, values in zip(axes.patches, scores.values(), strict=True):
        corners = patch.get_xy()
        edges, heights = corners[0:41:2, 0], corners[1:41:2, 1]
        counts, _ = np.histogram(values.double().numpy().clip(edges[0], None), edges)
        assert counts.sum() == len(values)
        assert heights == pytest.approx(counts / len(values))
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == ["digits", "noise"]
    lowest = torch.cat([*scores.values()]).quantile(0.01).item()
    assert axes.get_xlabel() == f"log p(x) (nats); the first bin holds all below {lowest:.4g}, too"
    assert plots.score_histograms({"a": torch.ones(9)}).axes[0].get_xlabel() == "log p(x) (nats)"


@pytest.mark.parametrize(
    ("scores", "match"), [({}, "empty"), ({"a": torch.zeros(0)}, "empty"), ({"a": torch.tensor([math.nan])}, "NaN")]
)
def test_score_histograms_refuse(scores, match):
    with pytest.raises(ValueError, match=match):
        plots.score_histograms(scores)


# -- classifiers -------------------------------------------------------------------------------------------------------


def test_ranks_are_marked_low_and_high_and_no_panel_is_empty():
    vae = dgm.build("vae", dgm.data.load("moons", num_data=50), latent_size=4)
    found = dgm.infer.check(vae, dgm.data.load("moons", "test")[:20], num_samples=40)
    figure = plots.calibration(found)
    panels = [axes for axes in figure.subfigs[0].axes if axes.get_visible()]
    assert len(panels) == 4
    for axes in panels:
        low, high = axes.get_xlim()
        assert [low < tick < high for tick in axes.get_xticks()] == [True, True]  # else they are not drawn


def test_curves_give_one_color_to_one_name_in_all_panels():
    panels = {"accuracy": {"p": [1.0, 0.5], "q": [0.9, 0.4]}, "log p(x)": {"q": [-1.0, -2.0]}}
    figure = plots.curves([0, 2], panels, xlabel="noise", title="t", percent=("accuracy",))
    top, below = figure.axes
    assert lines_of(top)["q"] == ([0, 2], [0.9, 0.4])
    assert lines_of(below)["q"] == ([0, 2], [-1.0, -2.0])
    color = {line.get_label(): line.get_color() for line in top.get_lines()}
    assert below.get_lines()[0].get_color() == color["q"] != color["p"]
    assert below.get_xlabel() == "noise"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["p", "q"]
    with pytest.raises(ValueError, match="3 values, but x has 2"):
        plots.curves([0, 1], {"a": {"b": [1, 2, 3]}}, xlabel="x")


def test_reliability_is_the_share_that_is_right_in_each_bin():
    # 10 data at confidence 0.8, of which 6 are right; 10 at 0.55, of which 5 are.
    right = torch.tensor([1] * 6 + [0] * 4 + [1] * 5 + [0] * 5)
    confidence = torch.tensor([0.8] * 10 + [0.55] * 10, dtype=torch.float64)
    probabilities = torch.stack([confidence, 1 - confidence], 1)
    figure = plots.reliability({"a": probabilities}, 1 - right)
    _, (name, (x, y)) = lines_of(figure.axes[0]).items()
    assert x == pytest.approx([0.55, 0.8])
    assert y == pytest.approx([0.5, 0.6])
    assert name == "a: off by 12.5 points on average"  # (0.05 + 0.2) / 2
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert not legend.get_window_extent().overlaps(figure.axes[0].get_window_extent())
    with pytest.raises(ValueError, match="labels"):
        plots.reliability({"a": probabilities}, right[:3])


def test_answers_show_image_class_share_and_what_is_rejected():
    x = torch.randint(17, (8, 1, 5, 4))
    probabilities = torch.rand(8, 3).softmax(-1)
    figure = plots.answers(x, probabilities, torch.arange(8) % 2 == 0, levels=17, num_columns=5)
    for i, axes in enumerate(figure.axes[:8]):
        assert np.array_equal(16 * axes.get_images()[0].get_array(), x[i, 0])
        top = probabilities[i].max(-1)
        assert axes.get_title() == f"{int(top.indices)}: {100 * float(top.values):.0f} %"
        assert len(axes.get_lines()) == (i + 1) % 2
    assert all(not axes.get_images() for axes in figure.axes[8:])
    with pytest.raises(ValueError, match="pass images"):
        plots.answers(x, probabilities[:3], torch.zeros(8))


def test_the_latent_map_projects_on_the_principal_components():
    random = torch.Generator().manual_seed(1)
    z = torch.randn(300, 5, generator=random) * torch.tensor([0.1, 3.0, 0.1, 1.0, 0.1])
    y = torch.arange(300) % 3
    axes = plots.latent_map(z, y).axes[0]
    points = np.concatenate([collection.get_offsets() for collection in axes.collections])
    assert points.shape == (300, 2)
    order = torch.cat([(y == label).nonzero().squeeze(1) for label in range(3)])
    first = np.corrcoef(points[:, 0], z[order, 1].numpy())[0, 1]
    second = np.corrcoef(points[:, 1], z[order, 3].numpy())[0, 1]
    # The components of 300 draws lean by about 0.1 / sqrt(300) of the small directions.
    assert abs(first) > 0.99
    assert abs(second) > 0.99
    assert [text.get_text() for text in axes.texts] == ["0", "1", "2"]
    variances = torch.linalg.eigvalsh(torch.cov(z.T))
    assert f"{100 * variances[-1] / variances.sum():.0f} % of the variance" in axes.get_xlabel()


def test_two_latents_are_shown_as_they_are():
    z, y = torch.randn(20, 2), torch.zeros(20, dtype=torch.long)
    axes = plots.latent_map(z, y).axes[0]
    assert np.allclose(axes.collections[0].get_offsets(), z)
    assert axes.get_xlabel() == "$z_1$"
    unnamed = plots.latent_map(z).axes[0]
    assert np.allclose(unnamed.collections[0].get_offsets(), z)
    assert not unnamed.texts
    with pytest.raises(ValueError, match="at least 2"):
        plots.latent_map(torch.zeros(20, 1), y)
