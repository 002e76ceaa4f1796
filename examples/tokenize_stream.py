"""Codes of a data set of Hugging Face, streamed: nothing but codes is stored, at any address of fsspec.

python examples/tokenize_stream.py ethz/food101 s3://bucket/food/ --split train --columns label
"""

import argparse

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from dyntok.batch import TokenizeColumn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="a name on the hub, or a pattern of Parquet files")
    parser.add_argument("output", help="a folder, here or on an object store")
    parser.add_argument("--split", default="train")
    parser.add_argument("--image", default="image", help="the column with the pictures")
    parser.add_argument("--columns", nargs="*", default=[], help="columns to keep")
    parser.add_argument("--shard", type=int, default=8192, help="rows in a file")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world", type=int, default=1, help="how many machines share the data set")
    args = parser.parse_args()

    files = args.dataset.endswith(".parquet")
    where = {"path": "parquet", "data_files": args.dataset} if files else {"path": args.dataset}
    rows = datasets.load_dataset(**where, split=args.split, streaming=True)
    rows = rows.shard(args.world, args.rank) if args.world > 1 else rows
    rows = rows.select_columns([args.image, *args.columns]).cast_column(args.image, datasets.Image(decode=False))
    rows = rows.map(TokenizeColumn(image=args.image), batched=True, batch_size=64, remove_columns=args.image)
    failed = 0
    for number, batch in enumerate(rows.with_format("arrow").iter(batch_size=args.shard)):
        table = batch if isinstance(batch, pa.Table) else pa.table(batch)
        failed += sum(reason != "" for reason in table["error"].to_pylist())
        name = f"{args.output.rstrip('/')}/{args.rank:04d}-{number:06d}.parquet"
        with fsspec.open(name, "wb", auto_mkdir=True) as file:
            pq.write_table(table, file, compression="zstd")
        print(f"{name}: {table.num_rows} rows")
    print(f"{failed} pictures failed; the column error says why")


if __name__ == "__main__":
    main()
