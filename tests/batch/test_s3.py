"""Input and output in S3: moto's server on loopback, through s3fs, with answers that fail in between."""

import threading

import pytest
from support.batch_data import codes, errors, files, pictures, run, tar_members, write_folder, write_table, write_tar

pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")

from torch.utils.data import DataLoader  # noqa: E402
from werkzeug.serving import make_server  # noqa: E402
from werkzeug.wrappers import Response  # noqa: E402

from dyntok.batch import CodesDataset, EngineOptions, inspect, read  # noqa: E402
from dyntok.batch.storage import Output  # noqa: E402
from dyntok.errors import BatchError  # noqa: E402

SECRET = "a-secret-nobody-may-see"


class Failing:
    """Every so many requests are answered with an error of the server's, as S3 does under load.

    `deny` refuses writing.
    """

    def __init__(self, app):
        self.app, self.every, self.deny, self.requests, self.failed = app, 0, False, 0, 0
        self.lock = threading.Lock()

    def __call__(self, environ, start_response):
        with self.lock:
            self.requests += 1
            fails = self.every and self.requests % self.every == 0
            self.failed += bool(fails)
            kind = self.failed % 2
        if fails:
            environ["wsgi.input"].read(
                int(environ.get("CONTENT_LENGTH") or 0)
            )  # without a length it would wait for the client
            code = ("503 Slow Down", "SlowDown") if kind else ("500 Internal Server Error", "InternalError")
            body = f"<Error><Code>{code[1]}</Code><Message>injected</Message></Error>"
            return Response(body, code[0], mimetype="application/xml")(environ, start_response)
        if self.deny and environ["REQUEST_METHOD"] in ("PUT", "POST"):
            body = "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            return Response(body, "403 Forbidden", mimetype="application/xml")(environ, start_response)
        return self.app(environ, start_response)


@pytest.fixture(scope="module")
def server():
    app = Failing(moto_server.DomainDispatcherApplication(moto_server.create_backend_app))
    listening = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    app.address = f"http://127.0.0.1:{listening.server_port}"
    yield app
    listening.shutdown()


@pytest.fixture
def s3(server):
    """Storage options, on an empty bucket."""
    server.every, server.deny, server.failed = 0, False, 0
    options = {"s3": {"key": "user", "secret": SECRET, "endpoint_url": server.address, "use_listings_cache": False}}
    fs = Output("s3://bucket", options).fs
    if fs.exists("bucket"):
        fs.rm("bucket", recursive=True)
    fs.mkdir("bucket")
    yield options
    server.every, server.deny = 0, False


@pytest.fixture(scope="module")
def images(photos):
    return pictures(photos) | {"bad": b"broken"}


def downloaded(address, options, folder):
    output = Output(address, options)
    output.fs.get(output.root, str(folder), recursive=True)
    return files(folder)


@pytest.mark.parametrize("every", [0, 7], ids=["quiet", "failing"])
def test_the_same_files_as_on_disk(every, server, s3, images, checkpoint_folder, tmp_path):
    sources = [
        write_tar(tmp_path / f"{i}.tar", tar_members({f"{i}/{key}": image for key, image in images.items()}))
        for i in range(2)
    ]
    table = write_table(tmp_path / "t.parquet", images)
    fs = Output("s3://bucket", s3).fs
    for path in (*sources, table):
        fs.put(path, f"bucket/in/{path.rpartition('/')[2]}")
    server.every = every
    for kind in ("tar", "parquet"):
        local = f"{tmp_path}/*.{kind}"
        run(local, tmp_path / f"local-{kind}", checkpoint_folder, shard_size=8)
        run(f"s3://bucket/in/*.{kind}", f"s3://bucket/{kind}", checkpoint_folder, shard_size=8, storage=s3)
        found = downloaded(f"s3://bucket/{kind}", s3, tmp_path / f"down-{kind}")
        assert codes(tmp_path / f"down-{kind}") == codes(tmp_path / f"local-{kind}")
        assert errors(tmp_path / f"down-{kind}") == errors(tmp_path / f"local-{kind}")
        assert all(SECRET.encode() not in content for content in found.values())
        again = run(f"s3://bucket/in/*.{kind}", f"s3://bucket/{kind}", checkpoint_folder, shard_size=8, storage=s3)
        assert again.rows == 0
    assert (server.failed > 0) == (every > 0)
    assert sum(len(batch.keys) for batch in read("s3://bucket/tar", storage=s3)) == 40
    assert inspect("s3://bucket/tar", storage=s3).images == 40


@pytest.mark.parametrize("workers", [0, 1])
def test_folders_of_images(workers, s3, images, checkpoint_folder, tmp_path):
    """Where decoding processes fetch the images."""
    folder = write_folder(tmp_path / "folder", images)
    Output("s3://bucket", s3).fs.put(folder, "bucket/folder", recursive=True)
    run(folder, tmp_path / "local", checkpoint_folder, shard_size=8, keep_columns=["txt"])
    options = {
        "shard_size": 8,
        "keep_columns": ["txt"],
        "storage": s3,
        "engine": EngineOptions(workers=workers, batch_size=3),
    }
    run("s3://bucket/folder", tmp_path / "out", checkpoint_folder, **options)
    assert codes(tmp_path / "out") == codes(tmp_path / "local") and set(errors(tmp_path / "out")) == {"bad.jpg"}


def test_interrupted_and_changed(s3, images, checkpoint_folder, tmp_path):
    fs = Output("s3://bucket", s3).fs
    fs.put(write_tar(tmp_path / "0.tar", tar_members(images)), "bucket/0.tar")

    class Stop(Exception):
        pass

    def stop(summary):
        if summary.rows == 12:
            raise Stop

    with pytest.raises(Stop):
        run("s3://bucket/0.tar", "s3://bucket/out", checkpoint_folder, shard_size=4, storage=s3, progress=stop)
    assert run("s3://bucket/0.tar", "s3://bucket/out", checkpoint_folder, shard_size=4, storage=s3).finished_before in (
        8,
        12,
    )
    fs.put(write_tar(tmp_path / "0.tar", tar_members(dict(reversed(images.items())))), "bucket/0.tar")
    with pytest.raises(BatchError, match="the input changed"):
        run("s3://bucket/0.tar", "s3://bucket/out", checkpoint_folder, shard_size=4, storage=s3)


def test_lost_permission_is_told_without_credentials(server, s3, images, checkpoint_folder, tmp_path):
    tar = write_tar(tmp_path / "0.tar", tar_members(images))

    def deny(summary):
        server.deny = summary.rows >= 10

    with pytest.raises(BatchError, match="can't write s3://bucket/out/.*(Forbidden|Access Denied)") as caught:
        run(tar, "s3://bucket/out", checkpoint_folder, shard_size=4, storage=s3, progress=deny)
    assert SECRET not in str(caught.value)
    server.deny = False
    assert run(tar, "s3://bucket/out", checkpoint_folder, shard_size=4, storage=s3).finished_before >= 8


def test_forked_workers_of_a_loader_read_codes(s3, images, checkpoint_folder, tmp_path):
    table = write_table(tmp_path / "t.parquet", images)
    run(table, "s3://bucket/out", checkpoint_folder, shard_size=8, storage=s3)
    data = CodesDataset("s3://bucket/out", batch_size=4, storage=s3)
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert sorted(key for batch in loader for key in batch.keys) == sorted(images.keys() - {"bad"})


def test_a_bucket_that_is_not_there(s3, checkpoint_folder, tmp_path):
    with pytest.raises(BatchError, match="s3://nowhere"):
        run(write_tar(tmp_path / "0.tar", []), "s3://nowhere/out", checkpoint_folder, storage=s3)
