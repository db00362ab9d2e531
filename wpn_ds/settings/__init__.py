"""Every setting: a field with its sentence, its check and its flag. No torch: --help answers at once."""
