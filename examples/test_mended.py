from mended import compress

from knorm.laws import parametrize_with_checks


@parametrize_with_checks([compress])
def test_my_compressor(compressor, check):
    check(compressor)
