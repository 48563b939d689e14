"""What every recipe and every table runs on."""
