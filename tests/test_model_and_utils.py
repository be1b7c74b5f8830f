"""What has mathematics in it: the layer table, fused normalisation, dropout, augmentation, schedule, averaging."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF

import utils
from model import ADAPTIVE_POOLS, BatchNormMaxPool, Block, Dropout, Net, count_parameters, layer_table
from utils import Augmentation, Loader, Split

SEED_TABLE = [  # name, output size (C, H, W), parameters: the seed's; RF and jump out: computed by hand in notes.md
    ("Input", (1, 28, 28), (), 1, 1),
    ("Conv1", (12, 28, 28), (108, 12), 3, 1),
    ("BatchNorm1", (12, 28, 28), (24,), 3, 1),
    ("MaxPool1", (12, 14, 14), (), 4, 2),
    ("Conv2", (24, 14, 14), (2592, 24), 8, 2),
    ("BatchNorm2", (24, 14, 14), (48,), 8, 2),
    ("MaxPool2", (24, 7, 7), (), 10, 4),
    ("Conv3", (24, 7, 7), (5184, 24), 18, 4),
    ("BatchNorm3", (24, 7, 7), (48,), 18, 4),
    ("Conv4", (12, 7, 7), (288, 12), 18, 4),
    ("BatchNorm4", (12, 7, 7), (24,), 18, 4),
    ("AdaptivePool", (12, 3, 3), (), 26, 8),
    ("FC1", (72,), (7776, 72), None, None),
    ("FC2", (10,), (720, 10), None, None),
]


@pytest.mark.parametrize("adaptive_pool", ADAPTIVE_POOLS)
def test_layer_table_is_the_seeds(adaptive_pool: str) -> None:
    model = Net(adaptive_pool=adaptive_pool)
    rows = [(r.name, r.output_size, r.parameters, r.rf, r.jump_out) for r in layer_table(model)]
    assert rows == SEED_TABLE
    assert count_parameters(model) == sum(sum(r.parameters) for r in layer_table(model)) == 16_966


def test_receptive_field_is_what_the_gradient_sees() -> None:
    """The central output of block 4 depends on 18 x 18 input pixels and not one more."""
    model = Net(activation="silu").eval()
    image = torch.randn(1, 1, 28, 28, requires_grad=True)
    stages = nn.Sequential(model.block1, model.block2, model.block3, model.block4)
    for block in stages:  # average pooling has max pooling's windows and lets every pixel through
        if isinstance(block.pool, nn.MaxPool2d):
            block.pool = nn.AvgPool2d(2)
    stages(image)[0, :, 3, 3].sum().backward()
    seen = image.grad[0, 0] != 0
    rows, columns = seen.any(1).nonzero(), seen.any(0).nonzero()
    assert int(rows.max() - rows.min()) + 1 == int(columns.max() - columns.min()) + 1 == 18


def test_table_leaves_no_hooks_and_restores_the_mode() -> None:
    model = Net()
    layer_table(model)
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_command_prints_the_table(run) -> None:
    printed = run("model.py").stdout
    assert "| Conv2        | 14x14x12   | 14x14x24    | 8  | 2       | 2        | 2,592 + 24 |" in printed
    assert "16,966" in printed
    assert f"{12 * 9 * 784 + 24 * 108 * 196 + (24 * 216 + 24 * 12) * 49 + 108 * 72 + 720:,} per image" in printed


def test_fused_batch_norm_and_pool_gradcheck() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 4, 6, dtype=torch.double, requires_grad=True)
    weight, bias = torch.rand(2, dtype=torch.double, requires_grad=True), torch.randn(2, dtype=torch.double)
    bias.requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: BatchNormMaxPool.apply(*args, 1e-5)[0], (x, weight, bias))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_fused_block_equals_the_plain_layers_with_scales_of_both_signs(momentum: float | None) -> None:
    """Output, gradients and running statistics of a block in training, against conv, BatchNorm2d and MaxPool2d."""
    torch.manual_seed(0)
    block = Block(3, 6, 3, pool=True, activation="relu", dropout=0.0).double().train()
    block.norm.num_batches_tracked += 3
    with torch.no_grad():
        block.norm.weight.copy_(torch.tensor([1.0, -0.7, 0.3, -2.0, 0.0, 1.5]))
        block.norm.bias.normal_()
    plain = Block(3, 6, 3, pool=True, activation="relu", dropout=0.0).double().train()
    plain.load_state_dict(block.state_dict())
    block.norm.momentum = plain.norm.momentum = momentum
    x = torch.randn(8, 3, 10, 10, dtype=torch.double)
    y_fused = block(x)
    y_plain = plain.act(plain.pool(plain.norm(plain.conv(x))))
    torch.testing.assert_close(y_fused, y_plain, atol=1e-10, rtol=1e-10)
    weights = torch.randn_like(y_plain)
    (y_fused * weights).sum().backward()
    (y_plain * weights).sum().backward()
    for (name, a), b in zip(block.named_parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-9, rtol=1e-9, msg=name)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(block.state_dict()[name], buffer, atol=1e-10, rtol=1e-10, msg=name)


def test_memory_format_changes_nothing() -> None:
    torch.manual_seed(0)
    model, x = Net(dropout=[0.0] * 5), torch.randn(4, 1, 28, 28)
    expected = model(x)
    torch.testing.assert_close(utils.place(model, torch.device("cpu"))(x), expected, atol=1e-4, rtol=1e-4)


def test_dropout_rate_mean_and_scaling() -> None:
    torch.manual_seed(0)
    layer, x = Dropout(0.3), torch.ones(100, 24, 14, 14).to(memory_format=torch.channels_last)
    y = layer(x)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    deviation = math.sqrt(0.3 * 0.7 / x.numel())
    assert abs((y == 0).double().mean().item() - 0.3) < 4 * deviation
    neighbours = ((y[..., 1:] == 0) & (y[..., :-1] == 0)).double().mean().item()
    assert abs(neighbours - 0.09) < 4 * deviation  # independent of the element beside it
    assert layer.eval()(x) is x


def test_dropout_is_seeded_and_keeps_odd_shapes() -> None:
    x = torch.randn(3, 5, 7)[:, :, ::2]
    torch.manual_seed(1)
    first = Dropout(0.5)(x)
    torch.manual_seed(1)
    assert torch.equal(Dropout(0.5)(x), first)
    assert torch.equal(first[first != 0], 2 * x[first != 0])


def test_scale_dropout_reaches_every_layer() -> None:
    model = Net(dropout=(0.1, 0.2, 0.3, 0.4, 0.5))
    model.scale_dropout(0.5)
    assert [m.p for m in model.modules() if isinstance(m, Dropout)] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25])
    model.scale_dropout(0)
    model.train()
    x = torch.randn(8, 1, 28, 28)
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("seed", range(8))
def test_warp_is_torchvisions_affine(seed: int) -> None:
    """Image by image, for random angle, translation, scale and both shears together."""
    g = torch.Generator().manual_seed(seed)
    images = torch.rand(16, 1, 28, 28, generator=g)
    u = torch.rand(16, 6, generator=g) * 2 - 1
    angle, translate, scale, shear = 25 * u[:, 0], 5 * u[:, 1:3], 1 + 0.3 * u[:, 3], 15 * u[:, 4:6]
    ours = utils.warp(images, utils.affine_matrices(angle, translate, scale, shear))
    for i in range(16):
        theirs = TF.affine(
            images[i], angle[i].item(), translate[i].tolist(), scale[i].item(), shear[i].tolist(),
            interpolation=TF.InterpolationMode.BILINEAR,
        )  # fmt: skip
        torch.testing.assert_close(ours[i], theirs, atol=2e-4, rtol=0)


def test_warp_grid_is_affine_grid_and_elastic_moves_by_pixels() -> None:
    images, identity = torch.rand(2, 1, 28, 28), torch.eye(2, 3).expand(2, -1, -1)
    matrices = utils.affine_matrices(torch.tensor([9.0, -5.0]), torch.ones(2, 2), torch.ones(2), torch.ones(2, 2))
    grid = F.affine_grid(matrices, [2, 1, 28, 28], align_corners=False)
    expected = F.grid_sample(images, grid, align_corners=False)
    torch.testing.assert_close(utils.warp(images, matrices), expected, atol=1e-5, rtol=0)
    everywhere_one_right = torch.stack([torch.ones(2, 25), torch.zeros(2, 25)], 1)
    moved = utils.warp(images, identity, everywhere_one_right)
    torch.testing.assert_close(moved[..., :-1], images[..., 1:], atol=1e-4, rtol=0)


def test_augmentation_stays_in_its_ranges_and_fills_them() -> None:
    g = torch.Generator().manual_seed(0)
    matrices, _ = Augmentation(rotation=10, scale=0.1, translate=0.1).sample(5000, g)
    linear = matrices[:, :, :2]
    scale = 1 / torch.linalg.det(linear).sqrt()
    angle = torch.rad2deg(torch.atan2(linear[:, 0, 1], linear[:, 0, 0]))
    offset = (torch.linalg.inv(linear) @ matrices[:, :, 2:]).squeeze(2) / 2  # fraction of the side
    for values, low, high in ((scale, 0.9, 1.1), (angle, -10, 10), (offset, -0.1, 0.1)):
        span = high - low
        assert low - 1e-3 * span <= values.min() < low + 0.02 * span
        assert high - 0.02 * span < values.max() <= high + 1e-3 * span


@pytest.fixture
def split() -> Split:
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(230) % 10
    return Split(torch.randint(0, 256, (230, 1, 28, 28), dtype=torch.uint8, generator=g), labels)


def test_plain_loader_is_the_data_in_order_normalised(split: Split) -> None:
    loader = Loader(split, 64)
    batches = list(loader)
    assert len(loader) == len(batches) == 4 and [len(y) for _, y in batches] == [64, 64, 64, 38]
    x = torch.cat([x for x, _ in batches])
    torch.testing.assert_close(x, split.images / 255 / 0.3081)
    assert torch.equal(torch.cat([y for _, y in batches]), split.labels)


def test_shuffled_loader_shows_each_image_once_and_depends_on_seed_and_epoch_only(split: Split) -> None:
    def epoch(seed: int, number: int) -> torch.Tensor:
        loader = Loader(split, 64, Augmentation(), seed)
        loader.set_epoch(number)
        return torch.cat([x for x, _ in loader])

    first = epoch(0, 3)
    images = torch.cat([x for x, _ in Loader(split, 64)])
    assert not torch.equal(first, images)
    torch.testing.assert_close(first.flatten(1).sort(0).values, images.flatten(1).sort(0).values, atol=1e-4, rtol=0)
    torch.rand(5)  # the global generator has no part in it
    assert torch.equal(first, epoch(0, 3))
    assert not torch.equal(first, epoch(0, 4)) and not torch.equal(first, epoch(1, 3))


@pytest.mark.parametrize("size", [10, 23, 100, 229])
def test_hold_out_is_stratified_disjoint_and_whole(split: Split, size: int) -> None:
    tagged = Split(torch.arange(230).view(-1, 1), split.labels)
    rest, held = utils.hold_out(tagged, size, seed=0)
    assert len(held.labels) == size
    assert sorted(torch.cat([rest.images, held.images]).flatten().tolist()) == list(range(230))
    counts = torch.bincount(held.labels, minlength=10)
    assert counts.max() - counts.min() <= 1
    assert torch.equal(utils.hold_out(tagged, size, seed=0)[1].images, held.images)
    assert size == 229 or not torch.equal(utils.hold_out(tagged, size, seed=1)[1].images, held.images)


def test_folds_are_stratified_and_cover_everything_once(split: Split) -> None:
    folds = utils.stratified_folds(split.labels, 4, seed=0)
    assert torch.cat(folds).sort().values.tolist() == list(range(230))
    for fold in folds:
        counts = torch.bincount(split.labels[fold], minlength=10)
        assert counts.min() >= 5 and counts.max() <= 6  # 23 of each digit


def test_one_cycle_values() -> None:
    rates = [utils.one_cycle(step, 1000, lr=0.015, peak_lr=0.1, warmup=0.2) for step in range(1000)]
    assert rates[0] == pytest.approx(0.015)
    assert rates[100] == pytest.approx((0.015 + 0.1) / 2)
    assert rates[200] == max(rates) == pytest.approx(0.1)
    assert rates[600] == pytest.approx(0.05)
    assert 0 < rates[999] < 1e-5
    assert rates[:201] == sorted(rates[:201]) and rates[200:] == sorted(rates[200:], reverse=True)
    assert utils.one_cycle(0, 10, 0.015, 0.1, warmup=0.0) == pytest.approx(0.1)
    assert utils.one_cycle(9, 10, 0.015, 0.1, warmup=1.0) < 0.1


def test_schedule_is_torchs_one_cycle() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.015)
    # OneCycleLR peaks at step pct_start * total_steps - 1 and ends at total_steps - 1: here 200 and 1000, as ours.
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=1001, pct_start=201 / 1001, div_factor=0.1 / 0.015, final_div_factor=1e12,
        cycle_momentum=False,
    )  # fmt: skip
    for step in range(1000):
        assert scheduler.get_last_lr()[0] == pytest.approx(utils.one_cycle(step, 1000, 0.015, 0.1, 0.2), abs=1e-9)
        optimizer.step()
        scheduler.step()


def test_optimizer_is_nesterov_sgd_by_hand() -> None:
    parameter = nn.Linear(1, 1, bias=False)
    parameter.weight.data.fill_(2.0)
    optimizer = utils.make_optimizer(parameter, lr=0.1, momentum=0.9, weight_decay=0.01)
    w, velocity = 2.0, 0.0
    for gradient in (1.0, -3.0, 0.5):
        parameter.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        g = gradient + 0.01 * w
        velocity = 0.9 * velocity + g
        w -= 0.1 * (g + 0.9 * velocity)
        assert parameter.weight.item() == pytest.approx(w, rel=1e-5)


def test_ema_by_hand() -> None:
    model = Net()
    ema = utils.make_ema(model, updates=4)
    expected = None
    for step in range(60):
        model.fc2.bias.data.fill_(float(step))
        ema.update_parameters(model)
        weight = 1.0 if step == 0 else max(1 / 4, 1 / (1 + 0.1 * step))
        expected = float(step) if expected is None else expected + weight * (step - expected)
    assert ema.module.fc2.bias[0].item() == pytest.approx(expected, rel=1e-4)
    assert 55 < expected < 57  # 4 updates long: about 3 behind


def test_statistics_of_the_averaged_network_are_those_of_plain_digits(split: Split) -> None:
    import train

    trainer = train.Trainer(train.parse_args(["--epochs", "1"]).recipe, split, torch.device("cpu"))
    trainer.train_epoch(0)
    model = trainer.averaged()
    x, _ = next(iter(Loader(split.select(slice(None, None, train.PLAIN_EVERY)), 230)))
    for block in model.blocks():
        outputs = block.conv(x)
        torch.testing.assert_close(block.norm.running_mean, outputs.mean((0, 2, 3)), rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(block.norm.running_var, outputs.var((0, 2, 3)), rtol=1e-2, atol=1e-3)
        x = block.eval()(x)


def test_predict_and_accuracy(split: Split) -> None:
    model = Net().train()
    logits = utils.predict(model, split, batch_size=50)
    assert model.training and logits.shape == (230, 10)
    x = torch.cat([x for x, _ in Loader(split, 230)])
    torch.testing.assert_close(logits, model.eval()(x).detach(), atol=1e-5, rtol=1e-5)
    assert utils.accuracy(torch.eye(10)[[1, 2, 3, 4]], torch.tensor([1, 2, 3, 0])) == 75.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graph_and_eager_steps_agree(split: Split) -> None:
    import train

    args = train.parse_args(["--epochs", "3", "--batch-size", "32", "--dropout-until", "0"])
    device = torch.device("cuda")
    on_gpu = Split(*(t.to(device) for t in split))
    trainers = [train.Trainer(args.recipe, on_gpu, device, eager=eager) for eager in (False, True)]
    for trainer in trainers:
        for epoch in range(3):
            entry = trainer.train_epoch(epoch)
        assert math.isfinite(entry["train_loss"])
    graph, eager = (torch.cat([p.flatten() for p in t.model.parameters()]) for t in trainers)
    assert trainers[0].step.graph is not None and trainers[1].step.graph is None
    torch.testing.assert_close(graph, eager, atol=2e-2, rtol=2e-2)
