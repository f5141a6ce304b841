"Other people's programs for the same mathematics (development only): PyDMD and kooplearn beside ours, on the same data."
import warnings
import numpy as np, pytest, torch
from scipy.linalg import expm, sqrtm
from resnet_bk.dmd import StreamingDMD, dmd, hard_threshold, monomials, optimized_dmd, spectrum

with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    pydmd = pytest.importorskip('pydmd')
    linear_model = pytest.importorskip('kooplearn.linear_model')
    kernel = pytest.importorskip('kooplearn.kernel')
pytestmark = pytest.mark.filterwarnings('ignore')

A = np.array([[.8, .5, 0], [-.5, .8, .1], [.1, 0, .6]])
G = np.array([[1., -2], [1, -1]])                       # ω = ±i

def apart(a, b): # of two spectra, whatever their order
    gap = abs(np.asarray(a)[:,None] - np.asarray(b))
    return max(gap.min(0).max(), gap.min(1).max())

def ours(X, Y, r=None, **kw): # eigenvalues; the r largest
    lam = spectrum(dmd(torch.tensor(X), torch.tensor(Y), **kw))[0].numpy()
    return lam[:r]

def pairs(seed, noise=.05, M=50, A=A):
    g = np.random.default_rng(seed)
    X = g.standard_normal((M, len(A)))
    return X + noise*g.standard_normal(X.shape), X @ A.T + noise*g.standard_normal(X.shape)

def series(seed, A=A, M=80, noise=.1): # driven by noise, so that it does not die out
    g = np.random.default_rng(seed)
    x = [g.standard_normal(len(A))]
    for _ in range(M): x.append(A @ x[-1] + noise*g.standard_normal(len(A)))
    return np.array(x)

def low_rank(seed, M=200, d=30): # three modes in d dimensions under noise
    g = np.random.default_rng(seed)
    T = np.linalg.qr(g.standard_normal((d, 3)))[0]
    X = g.standard_normal((M, 3))
    return X @ T.T + .05*g.standard_normal((M, d)), X @ A.T @ T.T + .05*g.standard_normal((M, d))

@pytest.mark.parametrize('seed', range(3))
def test_pydmd_least_squares(seed):
    for X,Y,r in ((*pairs(seed), 3), (*low_rank(seed), 3)):
        assert apart(pydmd.DMD(svd_rank=r).fit(X.T, Y.T).eigs, ours(X, Y, r, rank=r)) < 1e-10

@pytest.mark.parametrize('seed', range(3))
def test_pydmd_total_least_squares(seed):
    for X,Y in (pairs(seed), low_rank(seed)):
        assert apart(pydmd.DMD(svd_rank=3, tlsq_rank=3).fit(X.T, Y.T).eigs, ours(X, Y, 3, rank=3, method='tls')) < 1e-10

def operator(X, Y): # PyDMD's, put together from its modes
    m = pydmd.DMD(svd_rank=-1).fit(X.T, Y.T)
    return (m.modes*m.eigs) @ np.linalg.inv(m.modes)

@pytest.mark.parametrize('seed', range(3))
def test_forward_backward_from_pydmds_forward_and_backward_fits(seed):
    for noise,tol in ((0, 1e-10), (.01, 1e-7), (.05, 1e-4)): # the two square roots part with the square of the variance
        X, Y = pairs(seed, noise)
        assert apart(np.linalg.eigvals(sqrtm(operator(X, Y) @ np.linalg.inv(operator(Y, X)))), ours(X, Y, method='fb')) < tol

def test_pydmds_fbdmd_where_its_two_bases_are_one():
    """PyDMD (2025.8.1) multiplies the forward operator, written in the left singular vectors of X, by the inverse of the backward one, written in those of Y.
    In a long stationary series the two are nearly the same, and FbDMD agrees with us; for pairs in general its eigenvalues are wrong even without noise."""
    x = series(0, np.array([[.9, .2, 0], [-.3, .9, 0], [0, 0, .5]])/1.02, M=20_000)
    assert apart(pydmd.FbDMD(svd_rank=3).fit(x.T).eigs, ours(x[:-1], x[1:], method='fb')) < 1e-3
    X, Y = pairs(0, 0.)
    true = np.linalg.eigvals(A)
    assert apart(ours(X, Y, method='fb'), true) < 1e-10
    if apart(pydmd.FbDMD(svd_rank=3).fit(X.T, Y.T).eigs, true) < 1e-6: pytest.fail('PyDMD has mended FbDMD: compare with it directly')

@pytest.mark.parametrize('shape', [(60, 40), (300, 30), (50, 50)])
def test_pydmds_rank(shape):
    g = np.random.default_rng(1)
    X = g.standard_normal((shape[0], 4)) @ g.standard_normal((4, shape[1])) + .1*g.standard_normal(shape)
    assert np.linalg.matrix_rank(dmd(torch.tensor(X), torch.tensor(X), rank='auto').numpy()) == pydmd.utils.compute_rank(X.T, 0) == 4
    beta = min(shape)/max(shape)                        # the polynomial in PyDMD approximates ω to 2 %
    assert abs(hard_threshold(beta)/(.56*beta**3 - .95*beta**2 + 1.82*beta + 1.43) - 1) < .02

@pytest.mark.parametrize('uneven', [False, True])
@pytest.mark.parametrize('noise', [0, .05])
def test_pydmds_optimized_dmd(uneven, noise):
    g = np.random.default_rng(3)
    t = np.sort(g.uniform(0, 12, 60)) if uneven else np.linspace(0, 12, 60)
    X = np.array([expm(s*G) @ [1, .5] for s in t]) + noise*g.standard_normal((60, 2))
    # their own first guess divides noise by the step; at uneven times it gives two real exponents here, and the search stays there
    theirs = pydmd.BOPDMD(svd_rank=2, num_trials=0, init_alpha=np.array([.9j, -.9j]), varpro_opts_dict=dict(tol=1e-14, maxiter=200)).fit(X.T, t)
    w, modes = optimized_dmd(torch.tensor(X), t, 2)
    assert apart(theirs.eigs, w.numpy()) < 1e-6         # both minimise the same sum of squares
    fit = (np.exp(t[:,None]*w.numpy()) @ modes.numpy().T).real
    assert np.linalg.norm(fit - X) <= np.linalg.norm(theirs.reconstructed_data.T.real - X)*(1 + 1e-9) + 1e-9

@pytest.mark.parametrize('seed', range(3))
def test_kooplearn_linear(seed):
    x = series(seed)
    stream = StreamingDMD(3)
    for a,b in zip(torch.tensor(x[:-1]).split(7), torch.tensor(x[1:]).split(7)): stream.update(a, b)
    for alpha in (0., .01, 1.):                         # theirs divides the Gram matrices by the number of pairs
        theirs = linear_model.Ridge(alpha=alpha, reduced_rank=False, eigen_solver='dense').fit(x).eig()
        assert apart(theirs, ours(x[:-1], x[1:], ridge=alpha*(len(x) - 1))) < 1e-8
        assert apart(theirs, spectrum(stream.operator(ridge=alpha*(len(x) - 1)))[0].numpy()) < 1e-8
    theirs = linear_model.Ridge(n_components=2, alpha=0., reduced_rank=False, eigen_solver='dense').fit(x).eig()
    assert apart(theirs, ours(x[:-1], x[1:], 2, rank=2)) < 1e-8

def test_kooplearn_monomials_and_a_polynomial_kernel(): # (1 + x·y)² is the inner product of scaled monomials up to degree 2
    J = np.array([[.9, -.1], [0, .8]])
    x = series(5, J, M=60, noise=.5)
    psi = monomials(torch.tensor(x), 2).numpy()
    mine = ours(psi[:-1], psi[1:])
    assert apart(linear_model.Ridge(alpha=0., reduced_rank=False, eigen_solver='dense').fit(psi).eig(), mine) < 1e-6
    m = kernel.KernelRidge(kernel='poly', gamma=1., coef0=1, degree=2, alpha=1e-12, n_components=6, reduced_rank=False, eigen_solver='dense')
    assert apart(m.fit(x).eig(), mine) < 1e-6
