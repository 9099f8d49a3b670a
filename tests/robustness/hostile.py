"""What files made to do harm are made of."""

import io
import os
import zipfile

import torch

SECONDS = 1.0  # in which such a file is refused


class Harm:
    """A Python object that leaves a file behind when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def records(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def packed(files, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def pickled(marker, wrap=lambda x: x):
    buffer = io.BytesIO()
    torch.save(wrap(Harm(marker)), buffer)
    return buffer.getvalue()
