"""Groups and near-duplicates: what counts once, and what rankings are made of."""

import csv
import dataclasses
import io
import json

import jax.numpy as jnp
import numpy as np
import pytest

import dtrak_jax as dtrak
from dtrak_jax.attribution import duplicates, groups
from dtrak_jax.attribution.groups import names_hash
from dtrak_jax.methods import METHODS
from dtrak_jax.report import export
from dtrak_jax.report.export import document
from dtrak_jax.report.standing import Standing, standing
from dtrak_jax.report.summary import summary

RNG = np.random.default_rng(0)


def dense(params, x, t, cond):
    """A network whose gradients tell pictures apart."""
    return jnp.tanh(x.reshape(len(x), -1) @ params).reshape(x.shape)


def features(n=40, pairs=2, k=64):
    return RNG.normal(size=(pairs, n, k)).astype(np.float32)


@pytest.mark.parametrize("entries", [2**26, 100])
def test_planted_near_duplicates_are_found_and_nothing_else(entries, monkeypatch):
    """Also a chain of them, far from the origin, and a few rows at a time."""
    monkeypatch.setattr(duplicates, "ENTRIES", entries)
    phi = features()
    phi[:, 7] = phi[:, 3]
    phi[:, 11] = phi[:, 3] + 0.2 * features(1)[:, 0]
    phi[:, 30] = phi[:, 11] + 0.2 * features(1)[:, 0]
    phi[:, 20] = phi[:, 25] + 0.5 * features(1)[:, 0]  # a cosine of .9
    digests = [*map(str, range(39)), "5"]
    expected = np.array([str(i) for i in range(40)])
    expected[[7, 11, 30]], expected[39] = "3", "5"
    assert duplicates.near_duplicates(100 + phi, digests).tolist() == expected.tolist()


def test_where_features_cannot_tell_pictures_apart_only_exact_copies_are(
    images, one_device
):
    """Of few dimensions, all the same, of one image, and with noise of their own."""
    digests = ["a", "b", "a", *"cdefghijk"]
    expected = ["0", "1", "0", *map(str, range(3, 12))]
    with pytest.warns(UserWarning, match="only copies with the same pixels are"):
        duplicates.near_duplicates(features(12, 2, 3))
    for phi in (features(12, 2, 3), np.ones((2, 12, 64))):
        assert duplicates.near_duplicates(phi, digests).tolist() == expected
        assert len(set(duplicates.near_duplicates(phi))) == 12
    assert duplicates.near_duplicates(features(1)).tolist() == ["0"]
    twice = np.concatenate([images, images])
    task = dtrak.Task(dense, dtrak.linear_schedule(), timesteps=1)
    shared = dtrak.featurize(task, jnp.eye(64) / 2, twice, dtrak.Projection(dim=512))
    assert len(set(duplicates.near_duplicates(shared))) == 12
    noise = shared.fingerprint | {"noise": "independent"}
    apart = dataclasses.replace(shared, fingerprint=noise)
    with pytest.warns(UserWarning, match="features do not share their noise"):
        assert len(set(duplicates.near_duplicates(apart))) == 24
    for wrong, message in ((digests[1:], "digests has 11"), (None, "threshold is 2")):
        with pytest.raises(ValueError, match=message):
            duplicates.near_duplicates(features(12), wrong, 0.9 if wrong else 2)
    with pytest.raises(ValueError, match=r"train features have shape \(5,\)"):
        duplicates.near_duplicates(np.ones(5))


def test_copies_share_influence_or_have_all_of_it():
    """The scores of an image, once it is there twice, are those of `COUNTED_ONCE`."""
    phi, query = features(12, 1, 8), features(3, 1, 8)
    twice = np.concatenate([phi, phi[:, :1]], axis=1)
    value = dtrak.absolute(2.0)
    inverse = np.linalg.inv(phi[0].T @ phi[0] + 2 * np.eye(8))
    leverage = phi[0, 0] @ inverse @ phi[0, 0]
    names = [n for n in METHODS if n.startswith(("trak", "dtrak", "gradient", "re"))]
    of_one_model = (n for n in names if not n.endswith(("-ensemble", "-layers")))
    for name in of_one_model:
        alone, both = (
            dtrak.attribute(train, query, method=name, damping=value).scores
            for train in (phi, twice)
        )
        share = 1 if name in duplicates.COUNTED_ONCE else 1 / (1 + leverage)
        for copy in (0, 12):
            np.testing.assert_allclose(both[:, copy], share * alone[:, 0], rtol=1e-4)
    assert duplicates.COUNTED_ONCE < METHODS.keys()


def test_a_cluster_is_one_entry_and_counts_once_in_a_group():
    rows = np.array([[1.0, 5, 2, -7, 3], [0, 1, -1, 2, 0.5]])
    ids, queries = np.array(list("abcde")), np.array(["q", "r"])
    copies, column = np.array(["a", "b", "a", "b", "e"]), np.array(list("xxxyy"))
    made = {
        method: dtrak.Scores(
            *(rows, ids, queries, method),
            errors=np.ones_like(rows),
            columns={"of": column},
            group_errors={names_hash(column): np.ones((2, 2))},
            copies=copies,
        )
        for method in ("trak", "pixel-cosine")
    }
    expected = {
        "trak": ([[3, -2, 3], [-1, 3, 0.5]], [2, 2, 1], [[8, -4], [0, 2.5]], [1, 1]),
        # The picture b counts once for each of the groups that have it, and a once for x.
        "pixel-cosine": (
            *([[2, 5, 3], [0, 2, 0.5]], [1, 1, 1]),
            *([[7, -4], [1, 2.5]], [np.nan, 1]),
        ),
    }
    for method, (merged, errors, sums, group_errors) in expected.items():
        pictures = made[method].merged()
        assert pictures.train_ids.tolist() == ["a", "b", "e"]
        assert pictures.scores.tolist() == merged
        assert pictures.errors.tolist() == [errors, errors]
        assert pictures.merged().scores.tolist() == merged
        assert pictures.top(1).ids[1, 0] == "b"
        of_groups = made[method].group("of")
        assert of_groups.scores.tolist() == sums
        np.testing.assert_array_equal(of_groups.errors, [group_errors] * 2)
        np.testing.assert_array_equal(made[method].scores, rows)
    assert duplicates.members(ids, copies) == {"a": ["a", "c"], "b": ["b", "d"]}
    plain = dataclasses.replace(made["trak"], copies=None)
    assert plain.merged() is plain
    with pytest.raises(ValueError, match="copies have shape"):
        dataclasses.replace(plain, copies=copies[:3])


def test_a_picture_that_is_there_twice_stands_out_as_one():
    """Its copies share what it would have, and are above the floor together."""
    rows = np.random.default_rng(0).exponential(size=(12, 200)).astype(np.float32)
    rows[0, :2] = 7
    ids, queries = np.arange(200).astype(str), np.arange(12).astype(str)
    copies = np.array(["0", "0", *ids[2:]])
    apart = dtrak.Scores(rows, ids, queries, "trak")
    once = dataclasses.replace(apart, copies=copies)
    above = [standing(scores, [], {}).supporting[0] for scores in (apart, once)]
    assert [row.nonzero()[0].tolist() for row in above] == [[], [0, 1]]


def test_an_export_tells_of_pictures_groups_and_queries_that_are_one_of_them():
    """Copies are an entry, a query that is one of them is named, NaN is null."""
    rows = np.array([[1.0, 5, 2, -7, 3], [0, 1, -1, 2, 0.1]], np.float32)
    ids, queries = np.array(list("abcde")), np.array(["q", "r"])
    scores = dtrak.Scores(
        *(rows, ids, queries, "trak"),
        copies=np.array(["a", "b", "a", "d", "e"]),
        columns={"of": np.array(list("xxyyy"))},
        errors=rows / 10,
        freedom=4,
    )
    above = np.zeros(rows.shape, bool)
    above[0, [0, 2]] = True
    judged = Standing(above, np.zeros_like(above), "", {"of": above[:, :2]})
    whole = json.loads(json.dumps(document(scores, judged, [["c"], []], 0)))
    assert whole["copies"]["clusters"] == {"a": ["a", "c"]}
    assert whole["errors"] == {"degrees_of_freedom": 4}
    first, second = whole["queries"]
    assert (first["training_image"], second["training_image"]) == ("c", None)
    assert [image["image"] for image in first["images"]] == ["b", "a", "e", "d"]
    assert first["images"][1] == {
        "rank": 2,
        "image": "a",
        "score": 3.0,
        "error": 0.3,
        "spread": None,
        "stands_out": True,
        "is_query": True,
        "copies": ["a", "c"],
    }
    marked = [i["is_query"] or i["stands_out"] for i in second["images"]]
    assert not any(marked)
    ranking = whole["groups"]["of"]["queries"][1]["groups"]
    assert [(g["group"], g["images"], g["error"]) for g in ranking] == [
        ("y", 3, None),
        ("x", 2, None),
    ]
    overall = whole["groups"]["of"]["overall"][0]
    assert overall == {
        "rank": 1,
        "group": "x",
        "images": 2,
        "value": (1 + 1 / np.float64(rows[1, 2:].sum(dtype=np.float64))) / 2,
        "first_of_queries": 1,
    }
    assert "share" not in ranking[0]
    # Names may hold whatever joins them elsewhere.
    ids = np.array(['a|b "c", d', *"bcde"])
    odd = dataclasses.replace(scores, train_ids=ids, copies=ids[[0, 1, 0, 3, 4]])
    whole = document(odd, Standing(None), [[], []], 0)
    table = csv.reader(io.StringIO(export.image_table(whole).decode()))
    cells = [json.loads(row[-1]) for row in list(table)[1:]]
    assert cells[1] == [ids[0], "c"] and cells[0] == ["b"]
    shared = document(scores, judged, [[], []], 0, shares=True)["groups"]["of"]
    assert [g["share"] for g in shared["queries"][0]["groups"]] == [1, 0]
    assert shared["queries"][0]["left_out"] == 2 / 6
    ends = document(scores, Standing(None, why="few"), [[], []], 1)
    assert [i["rank"] for i in ends["queries"][0]["images"]] == [1, 4]
    assert ends["queries"][0]["images"][0]["stands_out"] is None
    assert ends["not_judged"] == "few"
    assert list(summary({("trak", "generated"): scores}))[1:] == [
        "  trak, generated, of: x +0.95, y +0.33"
    ]
    alone = dataclasses.replace(scores, columns={"of": ["x"] * 5})
    assert list(summary({("trak", "generated"): alone})) == []


def test_shares_add_up_and_say_what_they_leave_out():
    sums = np.array([[3.0, 1, -2], [-1, 0, -4], [0, 0, 5]])
    shares, left_out = groups.shares(sums)
    np.testing.assert_array_equal(shares[[0, 2]], [[0.75, 0.25, 0], [0, 0, 1]])
    assert np.isnan(shares[1]).all()
    assert left_out.tolist() == [0.5, np.inf, 0]


def test_over_all_queries_each_counts_alike():
    sums = np.array([[3.0, 1, -2], [-100, 0, 50], [0, 0, 0]])
    np.testing.assert_allclose(groups.overall(sums), [0, 1 / 9, (-2 / 3 + 0.5) / 3])
    scaled = groups.overall(sums * [[7], [0.01], [1]])
    np.testing.assert_allclose(groups.overall(sums), scaled, atol=1e-15)
