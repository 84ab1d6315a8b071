// A load client: as fast as it can or at a fixed rate, to a URL, through a proxy or straight.
package main

import (
	"crypto/tls"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"sort"
	"strings"
	"sync"
	"time"
)

type result struct {
	latencies []time.Duration
	errors    int
}

func client(proxy string, connections int) *http.Client {
	transport := &http.Transport{
		MaxIdleConnsPerHost: connections, MaxConnsPerHost: connections, DisableCompression: true,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
	}
	if proxy != "" {
		address, err := url.Parse(proxy)
		if err != nil {
			panic(err)
		}
		transport.Proxy = http.ProxyURL(address)
	}
	return &http.Client{Transport: transport}
}

func once(c *http.Client, target, header string) error {
	request, err := http.NewRequest("GET", target, nil)
	if err != nil {
		return err
	}
	if name, value, found := strings.Cut(header, ": "); found {
		request.Header.Set(name, value)
	}
	response, err := c.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if _, err = io.Copy(io.Discard, response.Body); err == nil && response.StatusCode != 200 {
		err = fmt.Errorf("status %d", response.StatusCode)
	}
	return err
}

func work(c *http.Client, target, header string, end time.Time, every, offset time.Duration) (r result) {
	next := time.Now().Add(offset)
	for time.Now().Before(end) {
		if every > 0 {
			time.Sleep(time.Until(next))
			next = next.Add(every)
		}
		began := time.Now()
		if err := once(c, target, header); err != nil {
			r.errors++
			if r.errors == 1 {
				fmt.Println(err)
			}
			time.Sleep(10 * time.Millisecond)
			continue
		}
		r.latencies = append(r.latencies, time.Since(began))
	}
	return r
}

func main() {
	proxy := flag.String("x", "", "proxy")
	target := flag.String("u", "https://localhost:9443/", "url")
	header := flag.String("H", "", "one more header")
	connections := flag.Int("c", 32, "connections")
	length := flag.Duration("d", 4*time.Second, "how long")
	rate := flag.Float64("r", 0, "requests a second in all; 0: as fast as it can")
	flag.Parse()
	c := client(*proxy, *connections)
	var every time.Duration
	if *rate > 0 {
		every = time.Duration(float64(*connections) / *rate * float64(time.Second))
	}
	results := make([]result, *connections)
	end := time.Now().Add(*length)
	var group sync.WaitGroup
	for i := range results {
		group.Add(1)
		go func() {
			defer group.Done()
			offset := every * time.Duration(i) / time.Duration(*connections)
			results[i] = work(c, *target, *header, end, every, offset)
		}()
	}
	group.Wait()
	var all []time.Duration
	errors := 0
	for _, r := range results {
		all = append(all, r.latencies...)
		errors += r.errors
	}
	if len(all) == 0 {
		fmt.Println("0 none")
		return
	}
	sort.Slice(all, func(i, j int) bool { return all[i] < all[j] })
	at := func(part int) float64 { return float64(all[len(all)*part/100].Microseconds()) / 1000 }
	fmt.Printf("%d requests p50=%.3fms p99=%.3fms errs=%d\n", len(all), at(50), at(99), errors)
}
