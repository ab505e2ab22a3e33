"""Linear support vector machines as in Goyal et al. 2019, and the average precision by which VOC evaluates them."""
import torch
import torch.nn.functional as F

import common

COSTS = [2.0 ** k for k in range(-19, 8, 2)]  # cross-validation chooses among these


def linear_svm(x, y, cost, start=None):
    """[D, K]: the weights w of K support vector machines, one for each column of y, found by L-BFGS from `start`.

    Each minimizes |w|^2 / 2 + sum_i C_i max(0, 1 - y_i w.x_i)^2. x: [N, D]; y: [N, K] of 1, -1, or 0 for a row that the
    column leaves out; cost: C, a number or [K]; C_i is 2 C if y_i is 1, else C, as Goyal et al. weight them.
    """
    weight = cost * torch.where(y > 0, 2.0, 1.0) * y.abs()                             # C_i: [N, K]
    w = x.new_zeros(x.shape[1], y.shape[1]) if start is None else start.clone()
    w.requires_grad_()
    norm = (2 * x.T @ (weight * y)).norm(dim=0).clamp(min=1e-30)                      # [K], of the gradients at 0
    optimizer = torch.optim.LBFGS([w], max_iter=1000, tolerance_grad=1e-6, tolerance_change=0.0,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        slack = (1 - y * (x @ w)).clamp(min=0)                                         # [N, K]
        objectives = (w ** 2).sum(dim=0) / 2 + (weight * slack ** 2).sum(dim=0)        # [K]
        total = (objectives / norm).sum()  # no column depends on another; scaled alike, they converge alike
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(closure)
    return w.detach()


def average_precision(scores, truth):
    """[K]: the average precision of each column, the area under its precision-recall curve; nan for one without a 1.

    VOC has computed it so since 2010; before that it averaged over 11 recalls. The precision at a recall is the best at
    that recall or more. scores: [M, K]; truth: [M, K] of 1, -1, or 0 for a row that does not count.
    """
    truth = truth.gather(0, scores.argsort(dim=0, descending=True))
    hits, count = (truth > 0).cumsum(dim=0), (truth != 0).cumsum(dim=0)
    precision = (hits / count.clamp(min=1)).flip(0).cummax(dim=0).values.flip(0)
    return (precision * (truth > 0)).sum(dim=0) / hits[-1]


@common.exact_products()
def evaluate(x, y, x_val, y_val, single):
    """{"mAP", "accuracy" if `single`, "cost"} of one-vs-rest SVMs, learned from x [N, D] and y [N, K].

    Three-fold cross-validation chooses the cost. If every image has a `single` class, all SVMs share one cost, chosen
    by accuracy. Otherwise each class has its own, chosen by AP. "cost" is the median.
    """
    x, x_val = (F.pad(rows, (0, 1), value=1.0) for rows in (x, x_val))                 # the last column is the bias's
    y, y_val = y.to(x.dtype), y_val.to(x.dtype)
    fold = torch.arange(len(y), device=x.device) % 3  # not thirds in order: images are sorted by class
    held = F.one_hot(fold, 3)[:, None]                                                 # [N, 1, 3]
    y_fit, y_held = ((y[:, :, None] * part).flatten(1) for part in (1 - held, held))   # [N, K * 3]
    w, quality, progress = None, [], common.Progress("SVMs", len(COSTS))
    for cost in COSTS:
        w = linear_svm(x, y_fit, cost, w)
        scores = x @ w
        if single:
            unseen = (scores.view(*y.shape, 3) * held).sum(dim=2)  # [N, K], by the SVMs that did not learn from the row
            quality.append((unseen.argmax(dim=1) == y.argmax(dim=1)).float().mean().expand(y.shape[1]))
        else:
            quality.append(average_precision(scores, y_held).view(-1, 3).nanmean(dim=1))
        progress(len(quality))
    cost = torch.tensor(COSTS, device=x.device)[torch.stack(quality).nan_to_num().argmax(dim=0)]   # [K]
    scores = x_val @ linear_svm(x, y, cost)
    figures = {"mAP": average_precision(scores, y_val).nanmean().item()}
    if single:
        figures["accuracy"] = (scores.argmax(dim=1) == y_val.argmax(dim=1)).float().mean().item()
    return {**figures, "cost": cost.median().item()}
