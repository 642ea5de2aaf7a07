"""What keeps this repository: compilation ahead of time, and the pages of docs/ that are generated."""
