from __future__ import annotations

import gzip
import hashlib
import os
import re
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ps_elastic.errors import ConfigError, PlatformError
from ps_elastic.tasks import Task, digits, downloads, fashion_mnist, seeded, tasks
from ps_elastic.tasks.classification import evaluate_classifier, labelled_batches, split
from ps_elastic.tasks.digits import Digits, is_held_out
from ps_elastic.tasks.fashion_mnist import SHIFT, FashionMnist, Standardise, moved, read_idx
from ps_elastic.tasks.quadratic import Quadratic

DATA = Path(os.environ.get("PS_ELASTIC_DATA") or Path(__file__).parents[3] / "shared" / "data")
needs_fashion = pytest.mark.skipif(
    not all((DATA / "fashion-mnist" / name).exists() for name in fashion_mnist.FILES),
    reason="no Fashion-MNIST: PS_ELASTIC_DATA names no folder with fashion-mnist/, nor is there ../shared/data",
)


@pytest.fixture(autouse=True)
def data_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PS_ELASTIC_DATA", str(DATA))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small for more, and threads that outnumber the cores cost a hundredfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def metrics_of(task: Task, model: nn.Module) -> dict[str, float]:
    with torch.no_grad():
        return task.evaluate(model.eval())


def task_of(name: str, **settings: Any) -> Task:
    task = tasks.load(name)(**settings)
    task.prepare()
    return task


every_task = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_fashion if name == "fashion_mnist" else ()) for name, _ in tasks.items()]
)


# Every registered task


def test_three_tasks_are_registered() -> None:
    assert {"quadratic", "digits", "fashion_mnist"} <= {name for name, _ in tasks.items()}


@every_task
def test_the_same_seed_gives_the_same_model_and_leaves_torch_alone(name: str) -> None:
    task = task_of(name)
    torch.manual_seed(11)
    untouched = torch.rand(3)
    torch.manual_seed(11)
    first, again = task.model(4).state_dict(), task.model(4).state_dict()
    assert torch.equal(torch.rand(3), untouched)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert {parameter.dtype for parameter in task.model(4).parameters()} == {torch.float32}


@every_task
def test_batches_do_not_depend_on_who_asks_first_nor_on_global_generators(name: str) -> None:
    task = task_of(name)
    alone = list(islice(task.batches(2, 3, seed=5), 6))
    one, two = task.batches(1, 3, seed=5), task.batches(2, 3, seed=5)
    together = []
    for number in range(6):
        torch.manual_seed(number)
        np.random.seed(number)
        for _ in range(number):
            next(one)
        together.append(next(two))
    for batch, expected in zip(together, alone, strict=True):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(batch, expected, strict=True))
    others = islice(task.batches(2, 3, seed=6), 6)
    assert not all(torch.equal(ours[1], theirs[1]) for ours, theirs in zip(alone, others, strict=True))


@every_task
def test_a_few_steps_of_sgd_lower_the_loss(name: str) -> None:
    task = task_of(name)
    model = task.model(0)
    batches = task.batches(1, 1, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    before = metrics_of(task, model)
    for _ in range(40):
        optimizer.zero_grad()
        loss = task.loss(model.train(), next(batches))
        assert loss.shape == ()
        loss.backward()
        optimizer.step()
    after = metrics_of(task, model)
    assert after["loss"] < 0.8 * before["loss"]
    assert ("accuracy" in after) == (name != "quadratic")


@pytest.mark.parametrize(
    ("name", "settings", "key"),
    [
        ("quadratic", {"batch_size": 0}, "batch_size"),
        ("quadratic", {"curvature": ()}, "curvature"),
        ("quadratic", {"curvature": (1.0, 0.0)}, "curvature"),
        ("quadratic", {"dimension": 3}, "dimension"),
        ("quadratic", {"noise": -1.0}, "noise"),
        ("quadratic", {"heterogeneity": -1.0}, "heterogeneity"),
        ("digits", {"batch_size": 0}, "batch_size"),
        ("digits", {"heterogeneity": -0.1}, "heterogeneity"),
        ("fashion_mnist", {"batch_size": -3}, "batch_size"),
        ("fashion_mnist", {"heterogeneity": float("nan")}, "heterogeneity"),
        ("fashion_mnist", {"dropout": 1.0}, "dropout"),
    ],
)
def test_unusable_settings_are_refused_by_key(name: str, settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=r"got .*, expected ") as error:
        tasks.load(name)(**settings)
    assert error.value.key == key


# quadratic


def gradient(task: Quadratic, x: torch.Tensor, batch: Any) -> torch.Tensor:
    model = task.model(0)
    with torch.no_grad():
        model.get_parameter("x").copy_(x)
    task.loss(model, batch).backward()
    return model.get_parameter("x").grad


@pytest.mark.parametrize("seed", [0, 1])
def test_quadratic_gradient_is_the_closed_form_to_the_last_bit(seed: int) -> None:
    task = Quadratic(dimension=9, heterogeneity=2.0, optimum=0.3)
    c = torch.tensor([1, 2, 5, 10, 1, 2, 5, 10, 1], dtype=torch.float32)
    for worker in (1, 2, 3):
        optimum = torch.from_numpy(task.optima(3, seed)[worker - 1]).float()
        for batch in islice(task.batches(worker, 3, seed), 20):
            assert torch.equal(batch[0], optimum)
            x = torch.randn(9, generator=torch.Generator().manual_seed(seed))
            assert torch.equal(gradient(task, x, batch), c * (x - optimum) + batch[1])


def test_quadratic_noise_has_the_stated_mean_and_square() -> None:
    task = Quadratic(noise=3.0, batch_size=4)
    noise = torch.stack([batch[1] for batch in islice(task.batches(1, 2, seed=0), 20_000)]).double()
    assert task.sigma == 1.5
    # The squared norm of 4 Gaussians has a relative deviation of sqrt(2/4); 1/200 of it after 20,000; four of them.
    assert float((noise**2).sum(1).mean()) == pytest.approx(1.5**2, rel=4 * 0.7 / 141)
    assert float(noise.mean(0).abs().max()) < 4 * 0.75 / 141


def test_quadratic_workers_draw_unlike_noise() -> None:
    task = Quadratic()
    one, two = (next(task.batches(worker, 2, seed=0))[1] for worker in (1, 2))
    assert not torch.equal(one, two)


def test_quadratic_heterogeneity_is_the_deviation_of_the_workers_gradients() -> None:
    task = Quadratic(heterogeneity=3.0, optimum=1.0)
    for workers in (2, 5):
        pulls = task.c * (task.b - task.optima(workers, seed=0))  # grad f_i at the optimum
        assert np.allclose(pulls.sum(axis=0), 0, atol=1e-12)
        assert (pulls**2).sum(axis=1).mean() == pytest.approx(9.0)
    with pytest.raises(ConfigError, match=r"heterogeneity: got 3.0 for 1 worker, expected 0"):
        task.batches(1, 1, seed=0)


def test_quadratic_reports_loss_and_distance_to_its_optimum() -> None:
    task = Quadratic(curvature=(2.0, 8.0), optimum=1.0, start=4.0)
    assert task.evaluate(task.model(0)) == {"loss": 0.5 * (2 * 9 + 8 * 9), "distance": pytest.approx(18**0.5)}
    assert (task.smoothness, task.strong_convexity) == (8.0, 2.0)
    assert list(task.c) == [2.0, 8.0]
    assert list(task.b) == [1.0, 1.0]


def test_quadratic_settles_where_theory_says() -> None:
    """SGD on (c/2) x^2 with noise sigma ends at E x^2 = alpha sigma^2 / (c (2 - alpha c))."""
    task = Quadratic(curvature=(1.0,), noise=1.0, start=0.0)
    x, squares = torch.zeros(1), []
    for batch in islice(task.batches(1, 1, seed=0), 20_000):
        x = x - 0.2 * (x - batch[0] + batch[1])
        squares.append(float(x**2))
    assert np.mean(squares) == pytest.approx(0.2 / 1.8, rel=0.08)  # about 2,200 independent draws: 3 % each


# digits


def test_digits_holds_out_a_fifth_of_every_class_for_ever() -> None:
    labels = np.array([0, 1, 0, 0, 1, 0, 0, 0, 1])
    assert list(np.flatnonzero(is_held_out(labels))) == [0, 1, 7]
    task = Digits()
    train, test = task.train_data, task.test_data
    assert (len(train[1]), len(test[1])) == (1433, 364)
    assert np.abs(np.bincount(test[1]) / np.bincount(train[1]) - 0.25).max() < 0.01
    assert (float(train[0].min()), float(train[0].max())) == (0.0, 1.0)


def test_digits_batches_are_the_workers_own_part() -> None:
    task = Digits(batch_size=16)
    owners = [
        {tuple(image) for images, _ in islice(task.batches(worker, 3, seed=0), 30) for image in images.tolist()}
        for worker in (1, 2, 3)
    ]
    assert sum(map(len, owners)) == len(set.union(*owners)) == 1433  # all images are distinct; 480 of at most 478 drawn


def test_digits_is_learned_in_seconds() -> None:
    task = Digits(batch_size=32)
    model = task.model(0)
    batches = [task.batches(worker, 3, seed=0) for worker in (1, 2, 3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(300):  # 28,800 samples
        optimizer.zero_grad()
        for own in batches:
            (task.loss(model, next(own)) / 3).backward()
        optimizer.step()
    assert metrics_of(task, model)["accuracy"] > 0.95


def test_digits_without_scikit_learn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "find_spec", lambda name: None)
    with pytest.raises(PlatformError, match=re.escape("`pip install ps_elastic[examples]`")):
        Digits().prepare()


def test_digits_are_those_that_scikit_learn_loads() -> None:
    from sklearn.datasets import load_digits

    pixels, labels = digits._read_digits()
    assert np.array_equal(pixels, load_digits().data) and np.array_equal(labels, load_digits().target)


# what labelled tasks share


def test_labelled_batches_keep_image_and_label_together_and_types_as_they_were() -> None:
    labels = torch.arange(50)
    inputs = labels.to(torch.uint8).view(50, 1, 1)
    options = {"workers": 2, "batch_size": 8, "heterogeneity": 0.0, "seed": 0}
    for images, answers in islice(labelled_batches(inputs, labels, worker=2, **options), 9):
        assert images.dtype == torch.uint8
        assert images.shape == (8, 1, 1)
        assert images.flatten().tolist() == answers.tolist()
        assert set(answers.tolist()) <= set(split(labels.numpy(), 2, 0.0, 8, 0)[1])
    with pytest.raises(ValueError, match="got worker 0, expected 1 to 2"):
        labelled_batches(inputs, labels, worker=0, **options)


def test_too_many_workers_are_refused_before_the_first_batch() -> None:
    with pytest.raises(ConfigError, match=r"batch_size: worker \d+ of 50 would have 28 of 1433 samples"):
        Digits(batch_size=32).batches(1, 50, seed=0)


def test_evaluation_is_the_mean_over_all_samples_whatever_the_batches() -> None:
    with seeded(0):
        model, inputs, labels = nn.Linear(5, 3), torch.randn(23, 5), torch.randint(3, (23,))
    with torch.no_grad():
        scores = model(inputs)
        expected = float(nn.functional.cross_entropy(scores, labels))
        right = sum(int(row.argmax()) == int(label) for row, label in zip(scores, labels, strict=True))
        for size in (1, 7, 500):
            found = evaluate_classifier(model, inputs, labels, batch_size=size)
            assert found["loss"] == pytest.approx(expected, rel=1e-5)
            assert found["accuracy"] == right / 23


# fashion_mnist: model, loss, augmentation


def test_fashion_model_has_a_third_of_a_million_parameters_named_alike_with_and_without_dropout() -> None:
    plain, dropped = FashionMnist().model(0), FashionMnist(dropout=0.3).model(0)
    assert sum(parameter.numel() for parameter in plain.parameters()) == 311_818
    assert plain.state_dict().keys() == dropped.state_dict().keys()


def test_pixels_are_standardised() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1)
    expected = (torch.arange(256).double() / 255 - 0.2860) / 0.3530
    assert torch.allclose(Standardise()(images).flatten().double(), expected, atol=1e-6)


def random_images(number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (number, 1, 28, 28), generator=generator, dtype=torch.uint8)


def test_augmentation_shifts_and_mirrors_whole_images() -> None:
    images = random_images(40)
    with seeded(1):
        results = moved(images)
    assert results.shape == images.shape
    assert results.dtype == torch.uint8
    seen = set()
    for image, result in zip(images[:, 0].numpy(), results[:, 0].numpy(), strict=True):
        padded = np.pad(image, SHIFT)
        ways = [
            (down, right, mirror)
            for down in range(5)
            for right in range(5)
            for mirror in (1, -1)
            if np.array_equal(padded[down : down + 28, right : right + 28][:, ::mirror], result)
        ]
        assert len(ways) == 1
        seen.add(ways[0])
    assert len(seen) > 20  # of 50 ways, 28 are expected in 40 draws


def test_dropout_and_augmentation_draw_from_torchs_generator_alone_and_only_in_training() -> None:
    task = FashionMnist(dropout=0.5, augment=True)
    model, batch = task.model(0), (random_images(8), torch.arange(8))

    def loss(seed: int) -> float:
        with seeded(seed):
            return float(task.loss(model, batch).detach())

    np.random.seed(0)
    first = loss(1)
    np.random.seed(1)
    assert loss(1) == first
    assert loss(2) != first
    model.eval()
    assert loss(1) == loss(2)


# fashion_mnist: the files


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with four small files, which stand for the published ones; there are no other places, no network."""
    folder = tmp_path / "published"
    folder.mkdir()
    generator = np.random.default_rng(0)
    known = {}
    for name, full in fashion_mnist.FILES.items():
        shape = (40 if full.shape[0] == 60_000 else 20, *full.shape[1:])
        array = generator.integers(0, 256, shape) if len(shape) == 3 else np.arange(shape[0]) % 10
        (folder / name).write_bytes(packed(0x0800 + len(shape), shape, array.astype(np.uint8).tobytes()))
        known[name] = downloads.Known(*summed(folder / name), shape)
    monkeypatch.setattr(fashion_mnist, "FILES", known)
    monkeypatch.setattr(fashion_mnist, "MIRRORS", ("http://127.0.0.1:9/",))  # nobody answers there
    monkeypatch.setattr(downloads, "_shared", lambda: tmp_path / "shared")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("PS_ELASTIC_DATA", raising=False)
    return folder


@pytest.fixture
def mirror(small: Path) -> Iterator[str]:
    """The address of a server on this machine that has the four small files."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(small)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def packed(magic: int, shape: tuple[int, ...], content: bytes) -> bytes:
    return gzip.compress(b"".join(number.to_bytes(4, "big") for number in (magic, *shape)) + content, mtime=0)


def summed(path: Path) -> tuple[int, str]:
    return path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()


def test_idx_files_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path.write_bytes(packed(2051, (2, 3, 4), array.tobytes()))
    assert np.array_equal(read_idx(path, (2, 3, 4)), array)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (packed(2051, (5,), bytes(5)), "begins with the number 2051, expected 2049"),
        (packed(2049, (6,), bytes(6)), r"holds an array of shape \(6,\), expected \(5,\)"),
        (packed(2049, (5,), bytes(4)), "unpacks to 12 bytes, expected 13"),
        (packed(2049, (5,), bytes(6)), "unpacks to more than 13 bytes, expected 13"),
        (packed(2049, (5,), bytes(5))[:-10], r"not a whole gzip file \(\d+ bytes\): Compressed file ended"),
        (b"these are no labels", r"not a whole gzip file \(19 bytes\): Not a gzipped file"),
        (b"", "begins with the number 0, expected 2049"),
        (None, r"not a whole gzip file \(no file\)"),
    ],
    ids=["magic", "shape", "short", "long", "truncated", "not gzip", "empty", "missing"],
)
def test_what_is_not_the_idx_file_expected_is_refused_by_name(
    tmp_path: Path, content: bytes | None, complaint: str
) -> None:
    path = tmp_path / "labels.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"data_dir: .*labels\.gz: {complaint}"):
        read_idx(path, (5,))


def test_files_of_a_named_folder_are_used(small: Path) -> None:
    task = FashionMnist(data_dir=str(small), download=False, batch_size=4)
    task.prepare()
    images, labels = task.train_data
    assert (images.shape, images.dtype) == ((40, 1, 28, 28), torch.uint8)
    assert labels.tolist() == [number % 10 for number in range(40)]
    assert len(task.test_data[1]) == 20


def test_a_truncated_file_is_refused_by_name_and_not_replaced(small: Path) -> None:
    path = small / fashion_mnist.TEST_LABELS
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    message = rf"{path}: truncated: found {len(whole) - 7} bytes, expected {len(whole)}; delete it"
    with pytest.raises(ConfigError, match=message) as error:
        FashionMnist(data_dir=str(small)).prepare()
    assert error.value.key == "data_dir"
    assert path.read_bytes() == whole[:-7]


def test_a_file_of_the_right_size_and_other_content_is_refused(small: Path) -> None:
    path = small / fashion_mnist.TRAIN_IMAGES
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{path}: not the original: found .* with sha256 [0-9a-f]{{64}}, expected"):
        FashionMnist(data_dir=str(small)).prepare()
    path.write_bytes(bytes(content) + b"more")
    with pytest.raises(ConfigError, match=rf"{path}: not the original: found [\d,]+ bytes, expected"):
        FashionMnist(data_dir=str(small)).prepare()


def test_a_missing_folder_without_download_is_refused_with_what_to_do(small: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no train-images.*gz, .* in .*nowhere; put the four .* or set download: true"
    ):
        FashionMnist(data_dir=str(tmp_path / "nowhere"), download=False).prepare()
    with pytest.raises(ConfigError, match=rf"no .* in {tmp_path}/shared/fashion-mnist, {tmp_path}/cache/ps_elastic/"):
        FashionMnist(download=False).prepare()
    (small / fashion_mnist.TRAIN_LABELS).unlink()
    with pytest.raises(ConfigError, match=r"no train-labels-idx1-ubyte\.gz in "):
        FashionMnist(data_dir=str(small), download=False).prepare()


def test_the_usual_places_are_searched_in_order(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, shared, cache = (tmp_path / name / "fashion-mnist" for name in ("named", "shared", "cache/ps_elastic"))
    monkeypatch.setenv("PS_ELASTIC_DATA", str(named.parent))
    for place in (cache, shared, named):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(small)
        assert FashionMnist(download=False)._folder == place


def test_missing_files_are_fetched_once_and_checked(
    small: Path, mirror: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fashion_mnist, "MIRRORS", ("http://127.0.0.1:9/", mirror))  # the first one is down
    task = FashionMnist(batch_size=4)
    task.prepare()
    folder = tmp_path / "cache" / "ps_elastic" / "fashion-mnist"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in small.iterdir()
    }
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "100%" in shown.err
    assert len(task.train_data[1]) == 40
    monkeypatch.setattr(fashion_mnist, "MIRRORS", ())
    FashionMnist().prepare()


def test_a_download_that_is_not_the_original_is_refused_and_leaves_nothing(
    small: Path, mirror: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion_mnist, "MIRRORS", (mirror,))
    (small / fashion_mnist.TRAIN_IMAGES).write_bytes(b"an error page")
    with pytest.raises(ConfigError, match=r"train-images.*could not be fetched(.|\n)*SHA256 hash"):
        FashionMnist(data_dir=str(tmp_path / "new")).prepare()
    assert list((tmp_path / "new").iterdir()) == []


def test_offline_the_message_names_file_address_and_remedy(small: Path) -> None:
    with pytest.raises(ConfigError, match=r"could not be fetched into .*; put the four .*\n  http://127.0.0.1:9/train"):
        FashionMnist().prepare()


@pytest.mark.parametrize("package", ["pooch", "tqdm"])
def test_fetching_without_its_library_says_what_to_install(
    small: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    pytest.importorskip("pooch")  # whole, for the tests after this: it would never look for tqdm again
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(PlatformError, match=rf"needs {package}.*`pip install ps_elastic\[examples\]`"):
        FashionMnist().prepare()


@needs_fashion
def test_the_real_files_are_found_by_environment_variable() -> None:
    task = FashionMnist(download=False)
    task.prepare()
    assert task._folder == DATA / "fashion-mnist"
    images, labels = task.train_data
    assert images.shape == (60_000, 1, 28, 28)
    assert torch.bincount(labels).tolist() == [6000] * 10
    assert torch.bincount(task.test_data[1]).tolist() == [1000] * 10
    pixels = images.double() / 255
    assert (round(float(pixels.mean()), 4), round(float(pixels.std()), 4)) == (0.2860, 0.3530)


@needs_fashion
def test_fashion_mixtures_differ_between_workers_when_asked() -> None:
    def share(heterogeneity: float) -> np.ndarray:
        task = task_of("fashion_mnist", heterogeneity=heterogeneity)
        batches = islice(task.batches(1, 3, seed=0), 100)
        return np.bincount(np.concatenate([labels.numpy() for _, labels in batches]), minlength=10) / 3200

    assert np.abs(share(0.0) - 0.1).max() < 0.03  # deviation 0.005
    assert np.abs(share(5.0) - 0.1).max() > 0.1
