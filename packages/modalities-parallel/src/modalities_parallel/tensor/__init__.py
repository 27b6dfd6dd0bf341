"""Matrix products and tokens shared between ranks."""
