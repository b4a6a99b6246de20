"""A step's folder is whole or absent, and a bad key cannot leave the data folder."""

from dataclasses import dataclass

import numpy as np
import pytest

from fw_model.files import write_json
from fw_pipeline.steps.store import ClipStatus, Done, Store, load_arrays, save_arrays, write_done


@dataclass(frozen=True)
class Arrays:
    a: np.ndarray
    b: np.ndarray


DONE = Done(video="v.mp4", fingerprint="f", made_by="test:1", clips=[ClipStatus(clip_id="c", quality={"x": 1.0})])


def test_a_finished_step_is_read_back_as_written(tmp_path) -> None:
    store = Store(tmp_path)
    with store.writing("depth", "video-1") as folder:
        save_arrays(folder / "c.npz", Arrays(np.arange(3), np.eye(2)))
        write_done(folder, DONE)
    assert store.done("depth", "video-1") == DONE
    read = load_arrays(store.folder("depth", "video-1") / "c.npz", Arrays)
    np.testing.assert_array_equal(read.b, np.eye(2))


def test_a_step_that_fails_leaves_the_old_result_and_no_litter(tmp_path) -> None:
    store = Store(tmp_path)
    with store.writing("depth", "k") as folder:
        write_done(folder, DONE)

    def interrupted() -> None:
        with store.writing("depth", "k") as folder:
            (folder / "half").write_text("x")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        interrupted()
    assert store.done("depth", "k") == DONE
    assert [path.name for path in (tmp_path / "depth").iterdir()] == ["k"]


def test_a_new_result_replaces_the_old_one_whole(tmp_path) -> None:
    store = Store(tmp_path)
    for name in ("old", "new"):
        with store.writing("clips", "k") as folder:
            (folder / name).write_text(name)
            write_done(folder, DONE)
    assert {path.name for path in store.folder("clips", "k").iterdir()} == {"new", "done.json"}


@pytest.mark.parametrize("key", ["", "..", "../x", "a/b", "a\\b", ".hidden", "a\0b"])
def test_a_key_cannot_point_outside_its_step(tmp_path, key: str) -> None:
    with pytest.raises(ValueError, match="not a video key"):
        Store(tmp_path).folder("clips", key)


def test_arrays_of_an_older_layout_are_refused_by_name(tmp_path) -> None:
    np.savez(tmp_path / "x.npz", a=np.zeros(1))
    with pytest.raises(ValueError, match="lacks b"):
        load_arrays(tmp_path / "x.npz", Arrays)


def test_a_pickled_array_is_never_loaded(tmp_path) -> None:
    np.savez(tmp_path / "x.npz", a=np.array([{"code": 1}], dtype=object), b=np.zeros(1))
    with pytest.raises(ValueError, match="allow_pickle"):
        load_arrays(tmp_path / "x.npz", Arrays)


def test_json_is_replaced_whole(tmp_path) -> None:
    write_json(tmp_path / "sub" / "x.json", {"a": 1})
    write_json(tmp_path / "sub" / "x.json", {"a": 2})
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["x.json"]
    assert '"a": 2' in (tmp_path / "sub" / "x.json").read_text()
