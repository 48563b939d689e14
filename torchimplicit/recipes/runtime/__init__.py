"""The base on which every recipe and every table runs."""
