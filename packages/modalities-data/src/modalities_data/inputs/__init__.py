"""Documents from JSON Lines (plain, gzip, zstd), Parquet and plain text; on this machine or at an fsspec address."""
