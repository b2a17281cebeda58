"""Matrix products in PyTorch."""

from collections.abc import Iterable

import torch

from lattejax.benchmarks.speed import Call, Product


def product_calls(products: Iterable[Product]) -> dict[str, Call]:
    """Like `lattejax.benchmarks.speed.product_calls`, in float32."""

    def call(product: Product) -> Call:
        x, weight = torch.randn(product.rows, product.inputs), torch.randn(product.outputs, product.inputs)
        return lambda: torch.nn.functional.linear(x, weight).numpy()

    return {str(product): call(product) for product in products}
