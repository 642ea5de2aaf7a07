"""Writers of the generated parts of docs/, one ``python -m tools.pages.NAME`` each."""
