"""One process of eight virtual CPU devices, and the small parts that tests share."""

import atexit
import dataclasses
import gc
import io
import multiprocessing
import os
import shutil
import socket
import tempfile
from pathlib import Path

# Before anything computes: JAX reads these when it starts.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# The same operations in slower code, which takes half the time to compile; and
# devices that wait for each other on a busy machine, as those of a command do.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=1000000",
)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Workers and processes that tests start inherit it, and compile once for all.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(
        prefix="dtrak-jax-tests-"
    )
    atexit.register(
        shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True
    )

import fake_gcs
import fsspec.config
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dtrak_jax import cli, files, models
from dtrak_jax.config import ModelConfig
from dtrak_jax.models.tags import layer
from dtrak_jax.rng import normal
from dtrak_jax.run import Run

TINY = ModelConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(4, 8),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=2,
    dropout=0.0,
)
NO_ATTENTION = dataclasses.replace(
    TINY,
    block_out_channels=(4,),
    down_block_types=("DownBlock2D",),
    up_block_types=("UpBlock2D",),
    add_attention=False,
)
"""A UNet of which every parameter has a gradient (keys of an attention have no bias)."""


UNET_APPLY_FN = models.apply_fn
"""The UNet's own, also where `use_simple_network` has replaced it."""


def init(key):
    """Parameters of a network that compiles fast."""
    return {"w": 0.1 * normal(key, (3, 3, 1, 1)), "b": jnp.zeros(1, jnp.float32)}


def apply(params, x, t, cond):
    """That network."""
    y = jax.lax.conv_general_dilated(
        x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    y = layer(params["w"], x, y, padding="SAME")
    return jnp.tanh(y + params["b"].reshape(1, 1, 1, 1))


def train_apply(params, x, t, cond, keys):
    """The same in training."""
    return apply(params, x, t, cond)


def bottleneck(params, x, t):
    """What stands for that network's lowest level."""
    return jnp.asarray(x).reshape(len(x), -1)


def use_two_devices(patch):
    """Makes the first two devices the only ones: small work needs not be cut in eight."""
    two = jax.local_devices()[:2]
    patch.setattr(jax, "local_devices", lambda: two)
    patch.setattr(jax, "devices", lambda: two)


def use_simple_network(patch):
    """Gives every run the network above instead of its UNet: it compiles fast."""
    patch.setattr(models, "init_fn", lambda model: init)
    patch.setattr(models, "apply_fn", lambda model: apply)
    patch.setattr(models, "train_apply_fn", lambda model: train_apply)
    patch.setattr(models, "bottleneck_fn", lambda model: bottleneck)


def draw_nothing(patch):
    """Leaves the reports' figures empty: drawing them takes longer than all the rest."""

    def savefig(figure, file, **options):
        file.write(b'<svg xmlns="http://www.w3.org/2000/svg" version="1.1"/>')

    patch.setattr(Figure, "savefig", savefig)


def free_port():
    """A port of this machine that nobody listens to."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


FORKS = multiprocessing.get_context("forkserver")
"""It forks processes from one that has imported this module, which takes seconds."""
FORKS.set_forkserver_preload(["conftest"])


def begin(work, arguments, environment, error, umask):
    """What a process of `start_process` does."""
    os.environ.clear()
    os.environ.update(environment)
    os.umask(umask)
    for path, stream in ((os.devnull, 1), (error, 2)):
        with open(path, "w") as file:
            os.dup2(file.fileno(), stream)
    try:
        work(*arguments)
    finally:
        # By which processes of one run wait for each other; a fork leaves them out.
        atexit._run_exitfuncs()


def start_process(work, *arguments, environment, error=os.devnull, umask=0o22):
    """A process that calls a function of a test's module; `error` is its stderr."""
    with pytest.MonkeyPatch.context() as patch:
        # The process that forks begins with the first one.
        patch.setenv("PYTHONPATH", environment["PYTHONPATH"])
        # One whose files are cut short would leave half of a module that it compiled.
        patch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        given = (work, arguments, environment, error, umask)
        process = FORKS.Process(target=begin, args=given, daemon=True)
        process.start()
    return process


def environments(count, **changes):
    """The environment of each of `count` processes that share one run."""
    paths = DIGITS.parent.parent, Path(__file__).parent
    shared = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "JAX_NUM_PROCESSES": str(count),
    }
    return [shared | changes | {"JAX_PROCESS_ID": str(i)} for i in range(count)]


def losses(directory):
    """(step, loss) of every line of metrics.jsonl."""
    lines = files.read_json_lines(directory / "metrics.jsonl")
    return [(line["step"], line["loss"]) for line in lines]


def open_run(line):
    """The run of a command line."""
    _, config, options = cli.parse(line)
    return Run.at(config, options.workdir)


def store_of(workdir, name):
    """The feature store of a set of images, by the index that featurize writes."""
    return workdir / files.read_json(workdir / "features" / "stores.json")[name]


def run_arrays(run):
    """Every array that a run of all stages ends with."""
    arrays = {"params": run.params()}
    for path in [*sorted(run.workdir.glob("*/*.npz")), run.workdir / "splits.npz"]:
        arrays[path.name] = files.read_npz(path)
    for name in ("train", "validation", "generated"):
        for measurement in ("square", "loss"):
            features = run.features(name, measurement)
            arrays[name, measurement] = np.asarray(features)
            arrays[name, measurement, "norms"] = features.squared_norms
    return arrays | {"losses": losses(run.workdir)}


DIGITS = Path(__file__).parent.parent / "configs" / "digits.py"
PLANS = sorted((DIGITS.parent / "results" / "plans").glob("*.json"))
"""Made by `dtrak-jax plan`, each CONFIG_FEATURES_SLICE.json."""


def digits_command(stage, workdir, flags, changes):
    """A command line of the digits job; `changes` to the flags have __ for a dot."""
    flags = flags | {name.replace("__", "."): value for name, value in changes.items()}
    line = [stage, str(DIGITS), "--workdir", str(workdir)]
    for name, value in flags.items():
        line += [f"--{name}", *value.split()]
    return line


LONG = ("test_pipeline", "test_parallel", "test_stages", "test_base", "test_training")


def pytest_collection_modifyitems(items):
    """Begins with the longest files: none is left for one worker alone in the end."""
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_collection_finish():
    """Leaves what was imported out of every search for garbage, and searches less often:
    while JAX traces, that is a quarter of the time."""
    gc.freeze()
    gc.set_threshold(50_000)


@pytest.fixture(scope="module", autouse=True)
def forget_compiled():
    """Programs of all modules together would take gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def tiny():
    """(apply, params) of a UNet with every kind of layer."""
    model = models.build(TINY)
    return UNET_APPLY_FN(model), models.init(model, jax.random.key(0))


@pytest.fixture(scope="session")
def images():
    """Twelve images [12, 8, 8, 1]."""
    return np.random.default_rng(0).uniform(-1, 1, (12, 8, 8, 1)).astype(np.float32)


@pytest.fixture
def one_device(monkeypatch):
    """Makes the first device the only one."""
    first = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: first)
    monkeypatch.setattr(jax, "devices", lambda: first)


@pytest.fixture(scope="session")
def bucket():
    """A bucket that gs://bucket leads to, in this process and those that it starts."""
    with fake_gcs.serve() as bucket:
        # The clients read them once, when they are first used.
        os.environ.update(bucket.environment())
        fsspec.config.set_conf_env(fsspec.config.conf)
        yield bucket


def png(pixels, **options):
    """PNG bytes of uint8 pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", **options)
    return file.getvalue()


@pytest.fixture
def mocked(tmp_path, monkeypatch):
    """mock_data with the metadata of a prepared set: (name, n, splits) -> context."""
    import tensorflow_datasets as tfds

    encoder = "tensorflow_datasets.core.features.image_feature._ImageEncoder"
    mocking = "tensorflow_datasets.testing.mocking"

    def encode(self, pixels):
        return png(pixels[..., 0] if pixels.shape[2] == 1 else pixels)

    def as_stored(self, index):
        features = self._features
        example = tfds.testing.mocking.RandomFakeGenerator.__getitem__(self, index)
        return type(features).deserialize_example_np(
            features,
            features.serialize_example(example),
            decoders={"image": tfds.decode.SkipDecoding()},
        )

    # Unpatched, the first needs TensorFlow, and the second returns what no file does.
    monkeypatch.setattr(f"{encoder}._encode_image", encode)
    monkeypatch.setattr(f"{mocking}.EncodedRandomFakeGenerator.__getitem__", as_stored)

    def mock(name, examples, splits, names=None):
        builder = tfds.builder(name, data_dir=tmp_path)
        builder.info.set_splits(
            tfds.core.splits.SplitDict(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[examples],
                    num_bytes=0,
                    filename_template=tfds.core.ShardedFileTemplate(
                        data_dir=builder.data_path,
                        dataset_name=name,
                        split=split,
                        filetype_suffix="array_record",
                    ),
                )
                for split in splits
            )
        )
        builder.info.set_file_format("array_record", override=True)
        if names:
            builder.info.features["label"].names = names
        builder.data_path.mkdir(parents=True)
        builder.info.write_to_directory(builder.data_path)
        return tfds.testing.mock_data(num_examples=examples, data_dir=tmp_path)

    return mock
