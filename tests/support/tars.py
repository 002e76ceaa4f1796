"""Small webdataset tars of photographs."""

import io
import tarfile

from PIL import Image


def jpeg(photo, side=48):
    buffer = io.BytesIO()
    Image.fromarray(photo).resize((side, side)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path
