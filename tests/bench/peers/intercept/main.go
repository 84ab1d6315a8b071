// A Go CONNECT-intercepting proxy on 9071, whose leaves are ECDSA and made once a host, as ours are; and on 9073 the same as
// goproxy comes, which makes an RSA key for each CONNECT.
package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"log"
	"math/big"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/elazarl/goproxy"
)

type store struct {
	lock  sync.Mutex
	certs map[string]*tls.Certificate
}

func (s *store) Fetch(host string, make func() (*tls.Certificate, error)) (*tls.Certificate, error) {
	s.lock.Lock()
	defer s.lock.Unlock()
	if found, ok := s.certs[host]; ok {
		return found, nil
	}
	made, err := make()
	if err == nil {
		s.certs[host] = made
	}
	return made, err
}

func authority() *tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		log.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bench"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		log.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func proxy() *goproxy.ProxyHttpServer {
	p := goproxy.NewProxyHttpServer()
	p.Tr.TLSClientConfig = &tls.Config{InsecureSkipVerify: true}
	p.Tr.MaxIdleConnsPerHost = 256
	p.OnRequest().DoFunc(func(r *http.Request, c *goproxy.ProxyCtx) (*http.Request, *http.Response) {
		r.Header.Set("Authorization", "Bearer abcdefghijklmnopqrstuvwxyz0123456789")
		return r, nil
	})
	return p
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == "stock" {
		p := proxy()
		p.OnRequest().HandleConnect(goproxy.AlwaysMitm)
		log.Fatal(http.ListenAndServe("127.0.0.1:9073", p))
	}
	p := proxy()
	p.CertStore = &store{certs: map[string]*tls.Certificate{}}
	mitm := &goproxy.ConnectAction{Action: goproxy.ConnectMitm, TLSConfig: goproxy.TLSConfigFromCA(authority())}
	p.OnRequest().HandleConnect(goproxy.FuncHttpsHandler(func(host string, _ *goproxy.ProxyCtx) (*goproxy.ConnectAction, string) {
		return mitm, host
	}))
	log.Fatal(http.ListenAndServe("127.0.0.1:9071", p))
}
