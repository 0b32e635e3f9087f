"""The compiled plan: mixture, order and packing, known before any data is read."""
