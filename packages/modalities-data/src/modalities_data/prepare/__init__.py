"""From text files to packed folders."""
