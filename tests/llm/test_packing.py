"""Documents from Parquet into rows for training: nothing lost, no image cut, borders kept."""

import dataclasses
import pickle
from collections import Counter

import pytest
import torch

pyarrow = pytest.importorskip("pyarrow")
parquet_files = pytest.importorskip("pyarrow.parquet")

from dyntok.errors import CodeError, ConfigError, DataError, FingerprintError  # noqa: E402
from dyntok.llm import Document, ImageCodes, PackedDataset, Packer, in_drawn_order, parse_ids, read_documents  # noqa: E402
from dyntok.vocab import VisualVocab  # noqa: E402

VOCAB = VisualVocab.after(300, size=50)
BOS, EOS, PAD = 290, 291, 292


def encode(text):
    return list(text.encode())


def packer(**options):
    return Packer(options.pop("length", 40), VOCAB, encode, **{"bos": BOS, "eos": EOS, "pad": PAD} | options)


def documents(count=30):
    generator = torch.Generator().manual_seed(0)

    def codes():
        return torch.randint(0, 50, (int(torch.randint(1, 20, (), generator=generator)),), generator=generator).tolist()

    return [Document(f"d{i}", ("a cat " * (i % 3), ImageCodes(codes()), *["and"] * (i % 2))) for i in range(count)]


def test_everything_comes_once_and_no_image_is_cut():
    written = documents()
    rows = list(packer().pack(written))
    assert all(len(row.input_ids) == 40 for row in rows)
    images, ends = [], 0
    for row in rows:
        segments = parse_ids(row.input_ids, VOCAB)
        assert {s.kind for s in segments} <= {"text", "image"}
        images += [s.codes for s in segments if s.kind == "image"]
        ends += int((row.input_ids == EOS).sum())
    assert sorted(images) == sorted(tuple(d.segments[1].codes) for d in written) and ends == len(written)


def test_borders_of_documents():
    for row in packer().pack(documents()):
        for number in row.document.unique().tolist():
            places = (row.document == number).nonzero()[:, 0]
            if number < 0:
                assert (row.input_ids[places] == PAD).all() and (row.labels[places] == -100).all()
                continue
            assert row.position_ids[places].tolist() == list(range(len(places)))
            assert row.labels[places[0]] == -100
        seen = row.attention_mask()[0] == 0
        assert not (seen & (row.document[:, None] != row.document)).any() and not seen.triu(1).any()
        assert row.lengths.tolist() == [int((row.document == i).sum()) for i in range(int(row.document.max()) + 1)]


@pytest.mark.parametrize("loss", ["text", "image"])
def test_loss_on_one_modality(loss):
    for row in packer(loss=loss).pack(documents()):
        learned = row.input_ids[row.labels != -100]
        visual = (learned >= VOCAB.offset) | (learned == VOCAB.image_end)
        assert visual.all() if loss == "image" else not visual.any()
        assert len(learned) > 0


def test_text_that_spells_our_tokens_opens_no_image():
    evil = Packer(20, VOCAB, lambda text: [VOCAB.image_start, 7], bos=None, eos=None, pad=PAD)
    (row,) = evil.pack([Document("a", ("x",))])
    assert row.input_ids[:2].tolist() == [7, PAD]


@pytest.mark.parametrize("options", [dict(loss="none"), dict(length=1), dict(open_rows=0)])
def test_bad_options(options):
    with pytest.raises(ConfigError, match="expected"):
        packer(**options)


def test_an_image_longer_than_a_row():
    with pytest.raises(CodeError, match="an image of 'a' takes 52 tokens, more than a row of 40"):
        list(packer().pack([Document("a", (ImageCodes([1] * 50),))]))


@pytest.fixture
def parquet(tmp_path):
    table = {
        "key": [f"k{i}" for i in range(20)],
        "codes": [[i, i + 1] for i in range(20)],
        "caption": [["one", "two"] if i % 2 else ["three"] for i in range(20)],
    }
    parquet_files.write_table(pyarrow.table(table), tmp_path / "part.parquet")
    return tmp_path


def test_documents_of_a_parquet_folder(parquet):
    found = list(read_documents(parquet))
    assert [d.key for d in found] == [f"k{i}" for i in range(20)]
    assert all(
        list(d.segments[0].codes) == [i, i + 1] and d.segments[1] in ("one", "two", "three")
        for i, d in enumerate(found)
    )
    assert {d.segments[1] for epoch in range(4) for d in read_documents(parquet, epoch=epoch)} == {
        "one",
        "two",
        "three",
    }
    orders = [isinstance(in_drawn_order(d).segments[0], str) for d in found]
    assert 3 < sum(orders) < 17


def test_what_is_no_parquet_of_codes(parquet, tmp_path):
    with pytest.raises(DataError, match="has no column title"):
        list(read_documents(parquet, text="title"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no Parquet with the columns key and codes"):
        list(read_documents(tmp_path / "empty"))
    (tmp_path / "part.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="can't read"):
        list(read_documents(tmp_path))


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ('["a cat", "on a chair"]', {"a cat", "on a chair"}),
        (' ["one"]', {"one"}),
        ('\ufeff["one"]', {"one"}),
        ("[5]", {"[5]"}),
        ("[sic] a cat", {"[sic] a cat"}),
    ],
)
def test_companions_in_json_are_lists_of_texts(written, found, tmp_path):
    parquet_files.write_table(
        pyarrow.table({"key": ["k"], "codes": [[1, 2]], "json": [written]}), tmp_path / "a.parquet"
    )
    drawn = {d.segments[1] for epoch in range(20) for d in read_documents(tmp_path, text="json", epoch=epoch)}
    assert drawn == found


@pytest.mark.parametrize("written", ['{"caption": "a cat"}', '[{"caption": "a cat"}]', '["a", 1]'])
def test_other_json_is_no_text(written, tmp_path):
    parquet_files.write_table(
        pyarrow.table({"key": ["k"], "codes": [[1, 2]], "json": [written]}), tmp_path / "a.parquet"
    )
    with pytest.raises(DataError, match="json of k is JSON, .* expected text or a list of texts"):
        list(read_documents(tmp_path, text="json"))


def test_only_files_that_records_name_are_read(photos, checkpoint_folder, tokenizer, tmp_path):
    """As `batch.read` does, whatever the format, also in a subfolder; documents say whose codes they are."""
    import shutil

    from support.batch_data import codes, pictures, run, tar_members, write_tar

    tar = write_tar(tmp_path / "in.tar", tar_members(pictures(photos)))
    for form in ("parquet", "webdataset"):
        output = tmp_path / form / "run"
        run(tar, output, checkpoint_folder, format=form, keep_columns=["txt"], shard_size=8)
        if form == "parquet":
            wanted = codes(output)
        file = min(path for path in output.iterdir() if path.is_file())
        shutil.copy(file, output / f"000009-000000{file.suffix}")
        found = [
            (d.key, tuple(d.segments[0].codes), d.segments[1]) for d in read_documents(tmp_path / form, text="txt")
        ]
        assert sorted(found) == sorted((key, tuple(row), f"caption of {key}") for key, (row, _) in wanted.items())
        assert {d.fingerprint for d in read_documents(output, text=None)} == {tokenizer.fingerprint}
    vocab = VisualVocab.of(tokenizer, after=300)
    rows = list(Packer(600, vocab, encode, bos=BOS, eos=EOS, pad=PAD).pack(read_documents(output, text="txt")))
    images = [s for row in rows for s in parse_ids(row.input_ids, vocab) if s.kind == "image"]
    assert vocab.layout == "positions" and len(images) == len(wanted)
    other = dataclasses.replace(vocab, fingerprint="another")
    with pytest.raises(FingerprintError, match="the codes of .* come from"):
        list(Packer(600, other, encode, bos=BOS, eos=EOS, pad=PAD).pack(read_documents(output, text="txt")))


@pytest.mark.parametrize("any_grid", [False, True])
@pytest.mark.parametrize("layout", ["map", "lattice", "positions", "none"])
def test_rows_in_every_layout(layout, any_grid, tokenizer, photos):
    vocab = VisualVocab.of(tokenizer, after=300, layout=layout, any_grid=any_grid)
    enc = tokenizer.encode(photos[:3], places=layout if layout in ("map", "lattice") else None)
    images = [
        ImageCodes(codes.tolist(), positions.tolist(), (8, 8))
        for codes, positions in zip(enc.codes, enc.positions, strict=True)
    ]
    document = Document("a", ("a cat", *images))
    (row,) = Packer(800, vocab, encode, bos=BOS, eos=EOS, pad=PAD, loss="image").pack([document])
    found = [s for s in parse_ids(row.input_ids, vocab) if s.kind != "text"]
    assert [s.codes for s in found] == [tuple(image.codes) for image in images]
    if layout != "none":
        assert [s.positions for s in found] == [tuple(image.positions) for image in images]
    learned = row.input_ids[row.labels != -100]
    assert sorted(learned.tolist()) == sorted(
        id for rows in vocab.to_ids(enc) for id in rows.tolist() if id != vocab.image_start
    )


def test_ranks_and_workers_share_a_stream(parquet):
    def stream(rank, workers=0):
        data = PackedDataset(lambda epoch: read_documents(parquet, epoch=epoch), packer, rank=rank, world=2)
        return [row for row in torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers)]

    def images(rows):
        return sorted(s.codes for row in rows for s in parse_ids(row["input_ids"], VOCAB) if s.kind == "image")

    for workers in (0, 2):
        assert sorted(set(images(stream(0, workers) + stream(1, workers)))) == [(i, i + 1) for i in range(20)]


def test_workers_that_are_kept_see_the_epoch():
    data = PackedDataset(lambda epoch: [Document("a", (str(epoch),))], packer)
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in (0, 1, 5):
        data.set_epoch(epoch)
        (row,) = loader
        assert data.epoch == epoch and row["input_ids"][:3].tolist() == [BOS, *encode(str(epoch)), EOS]


def test_a_copy_keeps_the_epoch_and_has_its_own_from_there_on():
    data = PackedDataset(read_documents, Packer, epoch=3)
    copy = pickle.loads(pickle.dumps(data))
    copy.set_epoch(4)
    assert (data.epoch, copy.epoch) == (3, 4) and copy.documents is read_documents


@pytest.mark.parametrize("world", [1, 2, 3, 5, 50])
def test_ranks_have_equally_many_rows(parquet, world):
    def streams(remainder="repeat"):
        options = {"world": world, "remainder": remainder}
        return [
            list(PackedDataset(lambda epoch: read_documents(parquet), packer, rank=rank, **options))
            for rank in range(world)
        ]

    everything = list(PackedDataset(lambda epoch: read_documents(parquet), packer))
    for remainder, expected in (("repeat", -(-len(everything) // world)), ("drop", len(everything) // world)):
        found = streams(remainder)
        assert [len(rows) for rows in found] == [expected] * world
        given = Counter(tuple(row["input_ids"].tolist()) for rows in found for row in rows)
        whole = everything if remainder == "repeat" else everything[: expected * world]
        assert set(given) == {tuple(row["input_ids"].tolist()) for row in whole}
        assert max(given.values(), default=0) - min(given.values(), default=0) <= 1  # none is repeated more than others


def test_from_what_dyntok_batch_writes(photos, checkpoint_folder, tmp_path):
    """One image per row, and interleaved documents; the errors table beside them is no document."""
    from support.batch_data import codes, pictures, rows, run, tar_members, write_tar

    images = pictures(photos)
    tar = write_tar(tmp_path / "in.tar", tar_members(images | {"bad": b"broken"}))
    run(tar, tmp_path / "single", checkpoint_folder, keep_columns=["txt"], shard_size=8)
    read = list(read_documents(tmp_path / "single", text="txt", positions=True))
    found = {document.key: document.segments for document in read}
    assert {key: (image.codes, image.positions) for key, (image, _) in found.items()} == codes(tmp_path / "single")
    assert all(text == f"caption of {key}" for key, (_, text) in found.items())
    vocab = VisualVocab.after(300, size=256)
    packed = Packer(300, vocab, encode, bos=BOS, eos=EOS, pad=PAD).pack(read)
    written = [
        segment.codes for row in packed for segment in parse_ids(row.input_ids, vocab) if segment.kind == "image"
    ]
    assert sorted(written) == sorted(tuple(row) for row, _ in codes(tmp_path / "single").values())

    content = list(images.values())
    cells = pyarrow.array(
        [[content[0], None, content[1]], [None, b"broken"], [content[2]]], pyarrow.list_(pyarrow.binary())
    )
    texts = [[None, "between", None], ["alone", None], ["under"]]
    parquet_files.write_table(
        pyarrow.table({"key": ["a", "b", "c"], "images": cells, "texts": texts}), tmp_path / "in.parquet"
    )
    run(tmp_path / "in.parquet", tmp_path / "several", checkpoint_folder, interleaved=True, keep_columns=["texts"])
    a, b, c = read_documents(tmp_path / "several", text="texts")
    made = {row["key"]: row["codes"] for row in rows(tmp_path / "several")}
    assert [s if isinstance(s, str) else s.codes for s in a.segments] == [made["a"][0], "between", made["a"][2]]
    assert b.segments == ("alone",) and [s if isinstance(s, str) else s.codes for s in c.segments] == [
        made["c"][0],
        "under",
    ]
