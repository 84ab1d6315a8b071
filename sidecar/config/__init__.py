"""`schema` collects each package's section, `load` reads and checks a file, `json_schema` is for editors."""
