"""What tells a result file, and the version of its layout."""

SCHEMA = "awq_pycuda"
SCHEMA_VERSION = 2
FIRST_WITH_CHECKSUMS = 2
FILE_NAME = "results.h5"
