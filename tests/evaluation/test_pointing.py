"""Pointing games: exact scores of maps that are known, the choice of images step by step, and wrong inputs."""

import numpy as np
import pytest
import torch

import bcoskit
from bcoskit.evaluation import accuracy, choose_grids, energy_pointing_game, grid_pointing_game, grid_scores, make_grid
from evaluation_toys import images, patches


def own_cell(sign):
    """A map that is `sign` where the image shows the class, `-sign` elsewhere: known for `images`."""

    def method(model, x, target):
        shown = x[torch.arange(len(x)), target] > 0
        return torch.where(shown, sign, -sign)

    return method


def uniform(model, x, target):
    return torch.ones_like(x[:, 0])


@pytest.mark.parametrize(("method", "score"), [(own_cell(1.0), 1.0), (uniform, 0.25), (own_cell(-1.0), 0.0)])
def test_known_maps_have_known_scores(method, score):
    result = grid_pointing_game(patches(), images(), method, grid=2, count=3)
    assert [row["score"] for row in result.rows] == [score] * 12
    assert result.median == score
    assert result.quartiles == (score, score)
    assert result.mean == score


def test_perfect_network_and_its_control():
    result = grid_pointing_game(patches(), images(), grid=2, count=3)
    assert result.method == "bcos"
    assert result.median == 1.0
    assert grid_pointing_game(patches(), images(), "gradient", grid=2, count=3).median == 0.25


def test_every_inverted_map_has_the_rest():
    """Of an inverted map the own cell is 0 and each other cell a third."""
    maps = torch.ones(1, 4, 4, 4)
    maps[0, 0, :2, :2] = -1
    assert grid_scores(maps, 2)[0].tolist() == pytest.approx([0, 0.25, 0.25, 0.25])
    assert grid_scores(-torch.ones(1, 4, 4, 4), 2)[0].tolist() == [0, 0, 0, 0]


def test_cells_are_filled_column_by_column():
    cells = torch.arange(9.0).view(1, 9, 1, 1, 1).expand(1, 9, 1, 2, 2)
    grid = make_grid(cells)[0, 0]
    assert grid[::2, ::2].tolist() == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    maps = torch.zeros(1, 9, 6, 6)
    maps[0, 3, :2, 2:4] = 5  # image 3 is in column 1, row 0
    maps[0, 4, :2, 2:4] = 5
    assert grid_scores(maps, 3)[0].tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0]


def test_scores_are_those_of_slow_loops():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 9, 15, 15, generator=generator, dtype=torch.float64)
    found = grid_scores(maps, 3, smooth=3)
    for n in range(2):
        for k in range(9):
            padded = np.pad(maps[n, k].numpy(), 1)
            mean = np.array([[padded[i : i + 3, j : j + 3].sum() / 9 for j in range(15)] for i in range(15)])
            positive = np.maximum(mean, 0)
            column, row = divmod(k, 3)
            cell = positive[5 * row : 5 * row + 5, 5 * column : 5 * column + 5].mean()
            means = [positive[5 * i : 5 * i + 5, 5 * j : 5 * j + 5].mean() for i in range(3) for j in range(3)]
            assert float(found[n, k]) == pytest.approx(cell / sum(means), rel=1e-12)
    assert not torch.allclose(found, grid_scores(maps, 3))


def ranking(counts, seed=3):
    """Rows of predictions: `counts[label]` images each, one of six wrong, one of seven without confidence."""
    random = np.random.RandomState(seed)
    labels = random.permutation([label for label, count in enumerate(counts) for _ in range(count)])
    rows = []
    for image, label in enumerate(labels):
        logit = float(random.uniform(0.1, 9)) if image % 7 else -float(random.uniform(0.1, 1))
        wrong = image % 6 == 5
        rows.append(
            {
                "image": image,
                "label": int(label),
                "predicted": int((label + wrong) % len(counts)),
                "logit": logit,
                "softmax": 0.98 + 0.02 * random.uniform(),
            }
        )
    return rows


def authors(rows, classes, n, count):
    """The authors' steps, one by one: list of images by draws, then the walk that loses one after each grid."""
    queues = {label: [] for label in range(classes)}
    for row in rows:
        if row["predicted"] == row["label"]:
            queues[row["label"]].append((row["logit"], row["image"]))
    queues = {label: sorted(queue, reverse=True) for label, queue in queues.items()}
    position = dict.fromkeys(queues, 0)

    def usable(label):
        index = position[label]
        return index < len(queues[label]) and 1 / (1 + np.exp(-queues[label][index][0])) > 0.5

    state = np.random.get_state()
    np.random.seed(42)
    sequence = []
    mask = np.array([usable(label) for label in range(classes)])
    while mask.sum() > n:
        for label in np.random.choice(np.arange(classes)[mask], n, replace=False):
            sequence.append((label, queues[label][position[label]][1]))
            position[label] += 1
            mask[label] = usable(label)
    np.random.set_state(state)
    grids, offset = [], 0
    for _ in range(count):
        chosen, used, i = [], set(), 0
        while len(chosen) < n:
            label, image = sequence[offset + i]
            i += 1
            if label not in used:
                used.add(label)
                chosen.append(image)
        grids.append(tuple(chosen))
        offset = offset + i + 1
    return grids, [image for _, image in sequence]


def test_grids_are_those_of_the_authors():
    rows = ranking([30] * 7)
    theirs, sequence = authors(rows, 7, 4, 12)
    assert choose_grids(rows, grid=2, count=12, authors_offset=True) == theirs
    ours = choose_grids(rows, grid=2, count=12)
    assert [image for grid in ours for image in grid] == sequence[:48]
    assert ours[0] == theirs[0]
    assert ours[1] != theirs[1]


def test_grids_hold_distinct_classes_of_images_used_once():
    rows = ranking([40] * 10)
    labels = {row["image"]: row["label"] for row in rows}
    for protocol in ("bcos", "rao"):
        grids = choose_grids(rows, grid=3, count=8, protocol=protocol)
        assert all(len({labels[image] for image in grid}) == 9 for grid in grids)
        used = [image for grid in grids for image in grid]
        assert len(set(used)) == len(used) == 72
        for image in used:
            row = rows[image]
            assert row["predicted"] == row["label"]
            assert row["logit"] > 0 if protocol == "bcos" else row["softmax"] >= 0.99
        assert grids != choose_grids(rows, grid=3, count=8, protocol=protocol, seed=1)
        assert grids == choose_grids(rows, grid=3, count=8, protocol=protocol)


def test_too_few_confident_images_are_named():
    with pytest.raises(ValueError, match=r"`count` \(=500\) grids of 4 classes .* enough for \d+ grids"):
        choose_grids(ranking([5] * 6), grid=2, count=500)
    with pytest.raises(ValueError, match="enough for 0 grids"):
        grid_pointing_game(patches(4), images(8, 4), grid=2, count=1)  # four classes are not more than four cells
    with pytest.raises(ValueError, match="confidence"):
        grid_pointing_game(patches(), images(strength=0.0), grid=2, count=1)


def test_one_forward_pass_serves_all_targets_of_a_grid():
    model, passes = patches(), []
    model.register_forward_hook(lambda _module, inputs, _output: passes.append(tuple(inputs[0].shape)))
    grid_pointing_game(model, images(), grid=2, count=3, batch_size=2)
    grids = [shape for shape in passes if shape[-1] == 8]
    assert grids == [(2, 5, 8, 8), (1, 5, 8, 8)]
    passes.clear()
    grid_pointing_game(model, images(), "input_x_gradient", grid=2, count=3)
    assert len([shape for shape in passes if shape[-1] == 8]) == 3


def test_grids_at_once_are_grids_one_by_one():
    one = grid_pointing_game(patches(), images(), "rise", grid=2, count=3)
    together = grid_pointing_game(patches(), images(), "rise", grid=2, count=3, batch_size=3)
    assert [row["score"] for row in one.rows] == pytest.approx([row["score"] for row in together.rows])
    assert [row["unit"] for row in one.rows] == [0] * 4 + [1] * 4 + [2] * 4


def test_a_sliding_window_sees_one_size_only():
    class OneSize(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = patches()

        def forward(self, x):
            assert x.shape[-1] == 4
            return self.inner(x)

    result = grid_pointing_game(OneSize().eval(), images(), grid=2, count=3, window=4, stride=2)
    assert result.median == 1.0
    with pytest.raises(ValueError, match=r"`stride` \(=3\) does not fit"):
        grid_pointing_game(OneSize().eval(), images(), grid=2, count=3, window=4, stride=3)
    with pytest.raises(ValueError, match="needs a `window`"):
        grid_pointing_game(OneSize().eval(), images(), grid=2, count=3, stride=2)


def test_a_sliding_window_adds_what_windows_find():
    from bcoskit.evaluation._pointing import sliding

    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 8, 8, generator=generator)
    target = torch.tensor([[0, 1], [2, 0]])

    def explained(windows, classes):
        return windows[torch.arange(len(windows))[:, None], classes] * (classes[..., None, None] + 1)

    found = sliding(explained, x, target, 4, 2)
    padded = torch.nn.functional.pad(x, [2] * 4)
    expected = torch.zeros(2, 2, 12, 12)
    for n in range(2):
        for k in range(2):
            for top in range(0, 9, 2):
                for left in range(0, 9, 2):
                    part = padded[n, target[n, k], top : top + 4, left : left + 4] * (int(target[n, k]) + 1)
                    expected[n, k, top : top + 4, left : left + 4] += part
    torch.testing.assert_close(found, expected[..., 2:-2, 2:-2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": 1}, "`grid`"),
        ({"count": 0}, "`count`"),
        ({"smooth": 2}, "`smooth`"),
        ({"threshold": 1.5}, "`threshold`"),
        ({"protocol": "other"}, "`protocol`"),
        ({"method": "nothing"}, "unknown; there are: bcos"),
        ({"window": 0}, "`window`"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        grid_pointing_game(patches(), images(), **{"grid": 2, "count": 1, **arguments})


def test_smoothing_is_that_of_the_papers():
    large = [(x.repeat_interleave(16, 1).repeat_interleave(16, 2), label) for x, label in images()]
    by_default = grid_pointing_game(patches(), large, uniform, grid=2, count=1)
    smooth = grid_pointing_game(patches(), large, uniform, grid=2, count=1, smooth=15)
    perfect = [grid_pointing_game(patches(), large, grid=2, count=1, smooth=size).median for size in (None, 1, 15)]
    assert by_default.scores.tolist() == smooth.scores.tolist()
    assert perfect[1] == 1.0
    assert perfect[0] == perfect[2] < 1.0


def boxed(region):
    return [(x, label, region) for x, label in images(4)]


def test_energy_inside_boxes_and_masks():
    def left_half(model, x, target):
        maps = torch.zeros_like(x[:, 0])
        maps[:, :, :2] = 3.0
        maps[:, 0, 3] = 2.0
        maps[:, 3, 3] = -5.0
        return maps

    inside = energy_pointing_game(patches(), boxed(torch.tensor([[0, 0, 2, 4]])), left_half)
    assert inside.scores.tolist() == pytest.approx([24 / 26] * 4)
    corner = torch.zeros(4, 4, dtype=torch.bool)
    corner[0, 3] = True
    assert energy_pointing_game(patches(), boxed(corner), left_half).scores.tolist() == pytest.approx([2 / 26] * 4)
    two = torch.tensor([[0, 0, 2, 4], [1, 0, 4, 1]])  # they overlap
    assert energy_pointing_game(patches(), boxed(two), left_half).median == 1.0
    assert energy_pointing_game(patches(), boxed(corner), lambda m, x, t: -x.sum(1) - 1).median == 0


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ([[0, 0, 5, 2]], "outside of the image of 4x4"),
        ([[-1, 0, 2, 2]], "outside"),
        ([[2, 0, 2, 2]], "empty"),
        ([[0, 0, 2]], "neither a mask"),
        (torch.zeros(4, 4), "zeros alone"),
        (torch.full((4, 4), 0.5), "zeros and ones"),
    ],
)
def test_wrong_regions(region, message):
    with pytest.raises(ValueError, match=message):
        energy_pointing_game(patches(), boxed(region))


def test_one_wrong_region_does_not_lose_the_others():
    data = boxed([[0, 0, 4, 4]])
    data[1] = (*data[1][:2], [[0, 0, 9, 9]])
    result = energy_pointing_game(patches(), data, batch_size=3)
    assert [row["image"] for row in result.rows] == [0, 2, 3]
    assert result.scores.tolist() == [1, 1, 1]
    assert [failure.unit for failure in result.failures] == [1]
    assert "outside" in result.failures[0].reason


def test_predictions_rank_the_images():
    rows = accuracy(patches(), images()).rows
    logits = torch.stack([patches()(x[None])[0] for x, _ in images()])
    assert [row["logit"] for row in rows] == pytest.approx(logits.amax(1).tolist())
    assert [row["softmax"] for row in rows] == pytest.approx(logits.softmax(1).amax(1).tolist())
    grids = choose_grids(rows, grid=2, count=1)
    assert set(grids[0]) < {0, 1, 2, 3, 4}  # the first image of each class is the strongest


def test_the_network_that_ships_finds_its_cell():
    from importlib.resources import files

    model = bcoskit.create_model("resnet20.bcos_cifar10", weights=True)
    folder = files("bcoskit.assets") / "photographs"
    shown = sorted(path for path in folder.iterdir() if path.name.endswith((".png", ".jpg")))
    data = []
    for path in shown:
        x = model.transform(path)
        with torch.no_grad():
            data.append((x, int(model(x[None]).argmax())))
    result = grid_pointing_game(model, data, grid=2, count=1)
    assert result.median > 0.7
    assert grid_pointing_game(model, data, "input_x_gradient", grid=2, count=1).median < 0.6


def test_shrunken_cells_make_a_grid_of_one_image():
    model, passes = patches(), []
    model.register_forward_hook(lambda _module, inputs, _output: passes.append(tuple(inputs[0].shape[-2:])))
    result = grid_pointing_game(model, images(), grid=2, count=2, rescale=True)
    assert result.median == 1.0
    assert passes[-1] == (4, 4)


def test_shrunken_cells_that_end_within_pixels():
    sizes = []

    def corner(model, x, target):
        sizes.append(tuple(x.shape[-2:]))
        return torch.zeros_like(x[:, 0]).index_fill(1, torch.tensor([0]), 1.0).index_fill(2, torch.arange(1, 4), 0.0)

    def middle(model, x, target):
        return torch.zeros_like(x[:, 0]).index_fill(2, torch.tensor([1]), 1.0)

    options = {"grid": 3, "count": 1, "rescale": True}
    network, data = patches(10), images(100, 10, strength=1.0)
    assert grid_pointing_game(network, data, uniform, **options).mean == pytest.approx(1 / 9)
    scores = [row["score"] for row in grid_pointing_game(network, data, corner, **options).rows]
    assert sizes[0] == (4, 4)
    assert scores == [1.0] + [0.0] * 8
    # The second of four columns lies from 1/4 to 1/2: a third of it in the first cell, which ends at 1/3.
    scores = [row["score"] for row in grid_pointing_game(network, data, middle, **options).rows]
    assert scores == pytest.approx([1 / 9] * 3 + [2 / 9] * 3 + [0] * 3)  # cells go down the columns


def test_unreadable_images_are_told():
    class Holes(list):
        def __getitem__(self, index):
            if index in (0, 1, 2, 3, 4, 5):
                raise KeyError("damaged")
            return super().__getitem__(index)

    result = grid_pointing_game(patches(), Holes(images(40)), grid=2, count=2)
    assert [failure.unit for failure in result.failures] == [0, 1, 2, 3, 4, 5]
    assert "image 0" in result.failures[0].reason


def test_a_missing_region_and_boxes_of_fractions():
    with pytest.raises(ValueError, match="region"):
        energy_pointing_game(patches(), images(4))
    touched = energy_pointing_game(patches(), boxed([[0.6, 0, 1.4, 4]]))
    assert touched.scores.tolist() == pytest.approx([0.5] * 4)
    four = torch.tensor([[0, 0, 1, 1]] * 4)  # in the shape of a mask
    assert energy_pointing_game(patches(), boxed(four)).scores.tolist() == pytest.approx([1 / 16] * 4)


def test_maps_that_are_no_grid_are_refused():
    with pytest.raises(ValueError, match="must be"):
        grid_scores(torch.rand(1, 4, 6, 6), 3)
    with pytest.raises(ValueError, match="square"):
        make_grid(torch.rand(1, 5, 3, 4, 4))


def test_wrong_numbers_of_grids():
    ranking = accuracy(patches(), images()).rows
    for options in ({"grid": 0}, {"grid": 1}, {"count": 0}, {"count": -1}, {"protocol": "x"}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
            choose_grids(ranking, **({"grid": 2, "count": 1} | options))


def test_a_window_of_one_pixel():
    assert grid_pointing_game(patches(), images(), grid=2, count=1, window=1).scores == pytest.approx([1.0] * 4)
