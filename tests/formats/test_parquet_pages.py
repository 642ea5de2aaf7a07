"""How much the pages of a parquet file become is known before they are decompressed."""

import io
import itertools
import random

import pyarrow
import pyarrow.parquet
import pytest

from seqmodels.formats import parquet_pages

draw = random.Random(0)
TEXTS = ["".join(draw.choices("abcdefghij \n", k=draw.randint(0, 900))) for _ in range(700)]


def written(texts=TEXTS, **options):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file, data_page_size=1 << 14, write_batch_size=50, **options)
    return file.getvalue()


def pages_of(content):
    column = pyarrow.parquet.ParquetFile(io.BytesIO(content)).metadata.row_group(0).column(0)
    begin = min(place for place in (column.dictionary_page_offset, column.data_page_offset) if place)
    end = begin + column.total_compressed_size
    return parquet_pages.pages(io.BytesIO(content), begin, end, column.num_values), column


@pytest.mark.parametrize(
    "codec, version, dictionary",
    list(itertools.product(["none", "snappy", "gzip", "zstd", "lz4"], ["1.0", "2.0"], [True, False])),
)
def test_pages_are_those_that_were_written(codec, version, dictionary):
    texts = [*TEXTS, *TEXTS[:300], None]
    found, column = pages_of(written(texts, compression=codec, data_page_version=version, use_dictionary=dictionary))
    assert sum(page.values for page in found) == len(texts) and len(found) > 1
    assert (found[0].values == 0) == dictionary
    headers = column.total_compressed_size - sum(page.compressed for page in found)
    assert 0 < headers < 4096 * len(found)
    assert sum(page.bytes for page in found) + headers == column.total_uncompressed_size


def test_damaged_pages_are_an_error_of_one_kind_or_read():
    content = bytearray(written())
    _, column = pages_of(content)
    begin, failed = column.dictionary_page_offset, 0
    for _ in range(2000):
        damaged = bytearray(content)
        for _ in range(draw.randint(1, 3)):
            damaged[begin + draw.randrange(40)] = draw.randrange(256)
        try:
            parquet_pages.pages(io.BytesIO(damaged), begin, begin + column.total_compressed_size, column.num_values)
        except ValueError:
            failed += 1
    assert failed > 500
