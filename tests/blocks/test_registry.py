"""Expressions of the config: what is built, and what is refused with the key's name."""

import pytest

from kd_d2.blocks import (
    KD_ADAPTERS,
    KD_DISTANCES,
    KD_NORMALISERS,
    KD_REGIONS,
    KD_SOURCES,
    KD_TRANSFORMS,
    All,
    Complement,
    GTCells,
    NearAnchor,
    Product,
    build_block,
)


def test_a_call_with_positional_and_named_literals():
    region = build_block(KD_REGIONS, " NearAnchor(0.25, scope='each') ", "KD.X")
    assert isinstance(region, NearAnchor)
    assert (region._threshold, region._scope) == (0.25, "each")


def test_a_bare_name_is_a_call_without_arguments():
    assert isinstance(build_block(KD_REGIONS, "All", "KD.X"), All)
    assert build_block(KD_REGIONS, "NearAnchor", "KD.X")._threshold == 0.5


def test_every_kind_of_literal():
    source = build_block(KD_SOURCES, "MapSource(key='neck', levels=(0, 2))", "KD.X")
    assert source.key == "neck" and source._levels == (0, 2)
    weights = build_block(KD_NORMALISERS, "Weights(2.0, channels=True, floor=1)", "KD.X")
    assert (weights._factor, weights._channels, weights._floor) == (2.0, True, 1)
    assert build_block(KD_DISTANCES, "SquaredL2(scale=-0.5)", "KD.X")._scale == -0.5
    assert build_block(KD_ADAPTERS, "ConvAdapter(3, std=None)", "KD.X")._std is None


def test_nested_blocks():
    region = build_block(
        KD_REGIONS, "Product(All, Complement(GTCells(levels='fpn')), NearAnchor(0.3))", "KD.X"
    )
    assert isinstance(region, Product)
    first, second, third = region._regions
    assert isinstance(first, All) and isinstance(third, NearAnchor)
    assert isinstance(second, Complement) and isinstance(second._region, GTCells)
    assert second._region._levels == "fpn"


@pytest.mark.parametrize(
    "registry, expression, message",
    [
        (KD_REGIONS, "NearAnchr(0.5)", r"'NearAnchr' is not registered in KD_REGIONS.*NearAnchor"),
        (KD_REGIONS, "GTCells(levels=fpn)", r"'fpn' is not registered.*Text needs quotes"),
        (KD_REGIONS, "NearAnchor(thresh=0.5)", r"unexpected keyword argument 'thresh'.*threshold"),
        (KD_REGIONS, "NearAnchor(0.5, 'all', 3)", r"too many positional.*scope"),
        (KD_REGIONS, "All(3)", r"too many positional"),
        (KD_REGIONS, "Complement()", r"missing a required argument: 'region'"),
        (KD_REGIONS, "NearAnchor(1.5)", r"'NearAnchor\(1.5\)': .*threshold must lie in \[0, 1\)"),
        (KD_REGIONS, "NearAnchor('a')", r"'NearAnchor\('a'\)': .*not supported between"),
        (KD_REGIONS, "Product()", r"Product needs at least one region"),
        (KD_REGIONS, "Assigned('fg')", r"\"pos\", \"neg\", \"valid\" or \"ignore\", got 'fg'"),
        (KD_REGIONS, "All(", r"not of the form Name\(key=value\)"),
        (KD_REGIONS, "All; All", r"not of the form Name\(key=value\)"),
        (KD_REGIONS, "", r"not of the form Name\(key=value\)"),
        (KD_REGIONS, "3", r"not of the form Name\(key=value\)"),
        (KD_REGIONS, 3, r"3 is not of the form Name\(key=value\)"),
        (KD_REGIONS, "Product(*[All])", r"neither a literal"),
        (KD_REGIONS, "NearAnchor(**{'threshold': 0.5})", r"'\*\*' cannot be used"),
        (KD_TRANSFORMS, "Softmax(0)", r"temperature must be positive, got 0"),
        (KD_TRANSFORMS, "SpatialSoftmax(-1.0)", r"temperature must be positive, got -1.0"),
        (KD_NORMALISERS, "Positives('all')", r'"rank" or "ranks", got \'all\''),
        (KD_NORMALISERS, "Const(0)", r"the divisor must be positive, got 0"),
        (KD_ADAPTERS, "ConvAdapter(2)", r"kernel_size must be odd, got 2"),
        (KD_SOURCES, "MapSource(pair='name')", r'pair must be "stride" or "index", got \'name\''),
        (KD_SOURCES, "MapSource(resize='both')", r'"student" or "teacher", got \'both\''),
        (KD_SOURCES, "DenseSource('obj')", r'output must be "cls", "box" or "ctr", got \'obj\''),
        (KD_SOURCES, "DenseSource('cls', bins=True)", r"bins are those of \"box\", not of 'cls'"),
        (KD_SOURCES, "MapSource(levels=1)", r"MapSource\(levels=1\)"),
    ],
)
def test_refused_with_the_name_of_the_key(registry, expression, message):
    with pytest.raises(ValueError, match=rf"(?s)^KD\.SOME\.KEY: .*{message}"):
        build_block(registry, expression, "KD.SOME.KEY")


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('echo')",
        "NearAnchor(__import__('pathlib').Path('{path}').touch())",
        "NearAnchor((lambda: open('{path}', 'w'))())",
        "NearAnchor([open('{path}', 'w') for _ in (1,)])",
        "NearAnchor(open('{path}', 'w'))",
        "All() if open('{path}', 'w') else All()",
        "NearAnchor(0.2 + 0.3)",
        "NearAnchor(f'{{1}}')",
    ],
)
def test_nothing_is_executed(expression, tmp_path):
    path = tmp_path / "written"
    with pytest.raises(ValueError, match="^KD.X: "):
        build_block(KD_REGIONS, expression.format(path=path), "KD.X")
    assert not path.exists()
