"""A trained run behind an address: `genrec serve`."""
