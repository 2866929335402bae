"""Everything online: sessions that run a checkpoint or a package, and what is measured with them."""
