"""All but the compiled part is in pyproject.toml. Without a compiler the package is installed without it."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "lightning_speedlimit.trajectory._rows",
            ["lightning_speedlimit/trajectory/rows.c"],
            # Roots are of numbers ≥ 0; a product and a sum are rounded each, as elsewhere.
            extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"],
            libraries=["m"],
            optional=True,
            py_limited_api=True,  # it knows nothing of Python: one for all versions
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
